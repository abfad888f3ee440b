#include "image/resize.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr double kLobes = 3;

double lanczos(double x) {
  if (x == 0) return 1;
  if (std::abs(x) >= kLobes) return 0;
  const double a = std::numbers::pi * x;
  return kLobes * std::sin(a) * std::sin(a / kLobes) / (a * a);
}

/// The inputs [first, first + weights) that make one output.
struct Taps {
  int first = 0;
  std::vector<double> weights;
};

/// `out` positions over the part [begin, begin + length) of an axis of `in` pixels.
std::vector<Taps> taps_of(int in, double begin, double length, int out) {
  const double step = length / out;
  const double widening = std::max(step, 1.0);
  std::vector<Taps> all;
  for (int i = 0; i < out; ++i) {
    const double centre = begin + (i + 0.5) * step;
    Taps taps{std::max(0, static_cast<int>(std::floor(centre - kLobes * widening))), {}};
    const int end = std::min(in, static_cast<int>(std::ceil(centre + kLobes * widening)));
    double sum = 0;
    for (int x = taps.first; x < end; ++x) {
      taps.weights.push_back(lanczos((x + 0.5 - centre) / widening));
      sum += taps.weights.back();
    }
    for (double& weight : taps.weights) weight /= sum;
    all.push_back(std::move(taps));
  }
  return all;
}

struct Part {
  double x, y, width, height;
};

/// Columns first, then rows; rounded once, at the end.
Image resized(const Image& image, Part part, int width, int height) {
  if (width < 1 || height < 1)
    throw Error(ErrorKind::usage, fmt::format("a picture of {}x{} pixels cannot be made", width, height));
  const std::vector<Taps> columns = taps_of(image.width, part.x, part.width, width);
  const std::vector<Taps> rows = taps_of(image.height, part.y, part.height, height);
  const std::size_t row_size = static_cast<std::size_t>(width) * 3;
  std::vector<float> narrow(row_size * static_cast<std::size_t>(image.height));
  parallel_for(image.height, [&](std::int64_t y) {
    const std::uint8_t* from = image.rgb.data() + static_cast<std::size_t>(y) * image.width * 3;
    float* to = narrow.data() + static_cast<std::size_t>(y) * row_size;
    for (const Taps& taps : columns)
      for (std::size_t c = 0; c < 3; ++c) {
        double sum = 0;
        for (std::size_t i = 0; i < taps.weights.size(); ++i)
          sum += taps.weights[i] * from[3 * (static_cast<std::size_t>(taps.first) + i) + c];
        *to++ = static_cast<float>(sum);
      }
  });
  Image out{width, height, std::vector<std::uint8_t>(row_size * static_cast<std::size_t>(height))};
  parallel_for(height, [&](std::int64_t y) {
    const Taps& taps = rows[static_cast<std::size_t>(y)];
    for (std::size_t x = 0; x < row_size; ++x) {
      double sum = 0;
      for (std::size_t i = 0; i < taps.weights.size(); ++i)
        sum += taps.weights[i] * narrow[(static_cast<std::size_t>(taps.first) + i) * row_size + x];
      out.rgb[static_cast<std::size_t>(y) * row_size + x] =
          static_cast<std::uint8_t>(std::lround(std::clamp(sum, 0.0, 255.0)));
    }
  });
  return out;
}

}  // namespace

Image resize_lanczos(const Image& image, int width, int height) {
  return resized(image, {0, 0, static_cast<double>(image.width), static_cast<double>(image.height)}, width, height);
}

Image cover(const Image& image, int width, int height) {
  if (image.width == width && image.height == height) return image;
  const double shrink = std::min(static_cast<double>(image.width) / width, static_cast<double>(image.height) / height);
  const double w = width * shrink;
  const double h = height * shrink;
  return resized(image, {(image.width - w) / 2, (image.height - h) / 2, w, h}, width, height);
}

}  // namespace sparvar
