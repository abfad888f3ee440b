// The error of fine detail against its definition, blur by blur.
#include "image/detail.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "image/random_image.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using testing::random_image;

/// What the blur takes away at one place: the whole two-dimensional window, edges mirrored step by step.
double detail(const Image& image, int x, int y, int c) {
  const auto mirror = [](int i, int size) {
    while (size > 1 && (i < 0 || i >= size)) i = i < 0 ? -i : 2 * (size - 1) - i;
    return size == 1 ? 0 : i;
  };
  const auto value = [&](int px, int py) {
    return static_cast<double>(image.rgb[static_cast<std::size_t>((py * image.width + px) * 3 + c)]);
  };
  double sum = 0, weights = 0;
  for (int i = -5; i <= 5; ++i)
    for (int j = -5; j <= 5; ++j) {
      const double weight = std::exp(-(i * i + j * j) / 4.5);
      weights += weight;
      sum += weight * value(mirror(x + j, image.width), mirror(y + i, image.height));
    }
  return value(x, y) - sum / weights;
}

TEST(DetailError, IsTheDifferenceOfWhatABlurTakesAway) {
  for (const auto& [width, height] : {std::pair{17, 9}, {3, 20}, {1, 1}, {1, 12}}) {
    const Image a = random_image(width, height, 1), b = random_image(width, height, 2);
    double squares = 0;
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x)
        for (int c = 0; c < 3; ++c) squares += std::pow(detail(a, x, y, c) - detail(b, x, y, c), 2);
    EXPECT_NEAR(detail_error(a, b), std::sqrt(squares / (3.0 * width * height)), 1e-9) << width << "x" << height;
  }
}

TEST(DetailError, DoesNotSeeABrighterPictureAndSeesABlurredOne) {
  Image a = random_image(32, 32, 3);
  for (auto& value : a.rgb) value = static_cast<std::uint8_t>(value / 2);
  Image brighter = a;
  for (auto& value : brighter.rgb) value = static_cast<std::uint8_t>(value + 40);
  EXPECT_NEAR(detail_error(a, brighter), 0, 1e-9);
  EXPECT_EQ(detail_error(a, a), 0);
  const Image flat{32, 32, std::vector<std::uint8_t>(a.rgb.size(), 64)};
  EXPECT_GT(detail_error(a, flat), 20);
  EXPECT_THROW(detail_error(a, random_image(32, 31, 4)), Error);
}

}  // namespace
}  // namespace sparvar
