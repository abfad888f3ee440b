#include "image/detail.h"

#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "image/gaussian.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kRadius = kGaussianSide / 2;

/// The place that stands for `i` beyond the edges of [0, size): mirrored, the edge itself not repeated.
int mirrored(int i, int size) {
  if (size == 1) return 0;
  const int period = 2 * (size - 1);
  i = ((i % period) + period) % period;
  return i < size ? i : period - i;
}

/// One axis of the blur of a map [height][width][3].
std::vector<double> blurred(const std::vector<double>& map, int width, int height, bool across) {
  static const auto window = gaussian_window();
  std::vector<double> out(map.size());
  parallel_for(height, [&](std::int64_t row) {
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < 3; ++c) {
        double sum = 0;
        for (int i = -kRadius; i <= kRadius; ++i) {
          const std::int64_t y = across ? row : mirrored(static_cast<int>(row) + i, height);
          const std::int64_t column = across ? mirrored(x + i, width) : x;
          sum += window[static_cast<std::size_t>(i + kRadius)] *
                 map[static_cast<std::size_t>((y * width + column) * 3 + c)];
        }
        out[static_cast<std::size_t>((row * width + x) * 3 + c)] = sum;
      }
  });
  return out;
}

}  // namespace

/// The blur is linear: detail of the difference is the difference of details.
double detail_error(const Image& a, const Image& b) {
  if (a.width != b.width || a.height != b.height || a.rgb.size() != b.rgb.size() || a.rgb.empty())
    throw Error(ErrorKind::usage, fmt::format("pictures of {}x{} and {}x{} pixels cannot be compared", a.width,
                                              a.height, b.width, b.height));
  std::vector<double> difference(a.rgb.size());
  for (std::size_t i = 0; i < difference.size(); ++i) difference[i] = static_cast<double>(a.rgb[i]) - b.rgb[i];
  const std::vector<double> smooth = blurred(blurred(difference, a.width, a.height, true), a.width, a.height, false);
  double sum = 0;
  for (std::size_t i = 0; i < difference.size(); ++i) sum += (difference[i] - smooth[i]) * (difference[i] - smooth[i]);
  return std::sqrt(sum / static_cast<double>(difference.size()));
}

}  // namespace sparvar
