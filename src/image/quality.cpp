// How alike two pictures are.
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "image/gaussian.h"
#include "sparvar/error.h"
#include "sparvar/image.h"

namespace sparvar {
namespace {

constexpr int kWindow = kGaussianSide;

void check_sizes(const Image& a, const Image& b) {
  if (a.width != b.width || a.height != b.height || a.rgb.size() != b.rgb.size() || a.rgb.empty())
    throw Error(ErrorKind::usage, fmt::format("pictures of {}x{} and {}x{} pixels cannot be compared", a.width,
                                              a.height, b.width, b.height));
}

/// Weighted means of a, b, a^2, b^2 and ab in a window.
using Means = std::array<double, 5>;

void accumulate(Means& to, const Means& from, double weight) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += weight * from[i];
}

/// The vertical half of the window: rows [top, top + 11) of one column.
Means column_means(const Image& a, const Image& b, int x, int top, int channel,
                   const std::array<double, kWindow>& window) {
  Means means{};
  for (int i = 0; i < kWindow; ++i) {
    const std::size_t at =
        (static_cast<std::size_t>(top + i) * static_cast<std::size_t>(a.width) + static_cast<std::size_t>(x)) * 3 +
        static_cast<std::size_t>(channel);
    const double p = a.rgb[at];
    const double q = b.rgb[at];
    accumulate(means, {p, q, p * p, q * q, p * q}, window[static_cast<std::size_t>(i)]);
  }
  return means;
}

double similarity(const Means& means) {
  constexpr double c1 = (0.01 * 255) * (0.01 * 255);
  constexpr double c2 = (0.03 * 255) * (0.03 * 255);
  const auto [a, b, aa, bb, ab] = means;
  return (2 * a * b + c1) * (2 * (ab - a * b) + c2) / ((a * a + b * b + c1) * (aa - a * a + bb - b * b + c2));
}

}  // namespace

double psnr(const Image& a, const Image& b) {
  check_sizes(a, b);
  double sum = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) {
    const double difference = static_cast<double>(a.rgb[i]) - b.rgb[i];
    sum += difference * difference;
  }
  if (sum == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.rgb.size()) / sum);
}

double ssim(const Image& a, const Image& b) {
  check_sizes(a, b);
  if (a.width < kWindow || a.height < kWindow)
    throw Error(ErrorKind::usage,
                fmt::format("SSIM needs pictures of at least {0}x{0} pixels, got {1}x{2}", kWindow, a.width, a.height));
  const auto window = gaussian_window();
  const int rows = a.height - kWindow + 1;
  const int columns = a.width - kWindow + 1;
  std::vector<double> row_sums(static_cast<std::size_t>(rows) * 3);
  parallel_for(static_cast<std::int64_t>(row_sums.size()), [&](std::int64_t task) {
    std::vector<Means> vertical(static_cast<std::size_t>(a.width));
    for (int x = 0; x < a.width; ++x)
      vertical[static_cast<std::size_t>(x)] =
          column_means(a, b, x, static_cast<int>(task / 3), static_cast<int>(task % 3), window);
    double sum = 0;
    for (int x = 0; x < columns; ++x) {
      const Means* column = vertical.data() + x;
      Means means{};
      for (const double weight : window) accumulate(means, *column++, weight);
      sum += similarity(means);
    }
    row_sums[static_cast<std::size_t>(task)] = sum;
  });
  double sum = 0;
  for (const double row : row_sums) sum += row;
  return sum / (3.0 * rows * columns);
}

}  // namespace sparvar
