// PSNR and SSIM against their definitions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>
#include <sstream>

#include "image/random_image.h"
#include "sparvar/error.h"
#include "sparvar/image.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_image;

Image noisy(Image image, int amount, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> noise(-amount, amount);
  for (auto& value : image.rgb) value = static_cast<std::uint8_t>(std::clamp(int{value} + noise(generator), 0, 255));
  return image;
}

/// The definition, window by window: means, variances about the mean, covariance.
double reference_ssim(const Image& a, const Image& b) {
  double weights[11][11];
  double total = 0;
  for (int i = 0; i < 11; ++i)
    for (int j = 0; j < 11; ++j) total += weights[i][j] = std::exp(-((i - 5) * (i - 5) + (j - 5) * (j - 5)) / 4.5);
  double sum = 0;
  int windows = 0;
  const auto value = [](const Image& image, int y, int x, int c) {
    return static_cast<double>(image.rgb.data()[(y * image.width + x) * 3 + c]);
  };
  for (int c = 0; c < 3; ++c)
    for (int y = 0; y + 11 <= a.height; ++y)
      for (int x = 0; x + 11 <= a.width; ++x, ++windows) {
        double ma = 0, mb = 0, va = 0, vb = 0, cov = 0;
        for (int i = 0; i < 11; ++i)
          for (int j = 0; j < 11; ++j) {
            ma += weights[i][j] / total * value(a, y + i, x + j, c);
            mb += weights[i][j] / total * value(b, y + i, x + j, c);
          }
        for (int i = 0; i < 11; ++i)
          for (int j = 0; j < 11; ++j) {
            const double da = value(a, y + i, x + j, c) - ma;
            const double db = value(b, y + i, x + j, c) - mb;
            va += weights[i][j] / total * da * da;
            vb += weights[i][j] / total * db * db;
            cov += weights[i][j] / total * da * db;
          }
        const double c1 = std::pow(0.01 * 255, 2);
        const double c2 = std::pow(0.03 * 255, 2);
        sum += (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2));
      }
  return sum / windows;
}

TEST(Psnr, MatchesTheDefinition) {
  const Image a = random_image(31, 17, 1);
  const Image b = noisy(a, 20, 2);
  double sum = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) sum += std::pow(static_cast<double>(a.rgb[i]) - b.rgb[i], 2);
  EXPECT_NEAR(psnr(a, b), 10 * std::log10(255 * 255 / (sum / static_cast<double>(a.rgb.size()))), 1e-9);
}

TEST(Psnr, OfKnownPictures) {
  const Image black{2, 2, std::vector<std::uint8_t>(12, 0)};
  const Image white{2, 2, std::vector<std::uint8_t>(12, 255)};
  EXPECT_NEAR(psnr(black, white), 0, 1e-12);
  EXPECT_TRUE(std::isinf(psnr(black, black)));
}

TEST(Ssim, MatchesTheDefinition) {
  for (const auto& [width, height] : {std::pair{11, 11}, {23, 14}, {12, 31}}) {
    const Image a = random_image(width, height, 3);
    for (const int amount : {1, 10, 100}) {
      const Image b = noisy(a, amount, 4);
      EXPECT_NEAR(ssim(a, b), reference_ssim(a, b), 1e-9) << width << " " << amount;
    }
    EXPECT_NEAR(ssim(a, random_image(width, height, 5)), reference_ssim(a, random_image(width, height, 5)), 1e-9);
    EXPECT_NEAR(ssim(a, a), 1, 1e-12);
  }
}

/// The pictures of scripts/image_quality_reference.py.
Image formula_picture(int width, int height) {
  Image image{width, height, {}};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < 3; ++c)
        image.rgb.push_back(static_cast<std::uint8_t>((x * x / (7 + c) + 3 * y * (c + 1) + (x > y ? 90 : 0)) % 256));
  return image;
}

Image changed(const Image& image, const std::string& kind) {
  Image out = image;
  for (std::size_t i = 0; i < image.rgb.size(); ++i) {
    const int value = image.rgb[i];
    if (kind.starts_with("noise")) {
      const auto amount = static_cast<std::uint32_t>(std::stoi(kind.substr(5)));
      std::uint32_t h = static_cast<std::uint32_t>(i) * 2654435761U;
      h = (h ^ h >> 15) * 2246822519U;
      const int noise = static_cast<int>((h >> 8) % (2 * amount + 1)) - static_cast<int>(amount);
      out.rgb[i] = static_cast<std::uint8_t>(std::clamp(value + noise, 0, 255));
    } else if (kind == "posterised") {
      out.rgb[i] = static_cast<std::uint8_t>(value & 0xE0);
    } else if (kind == "shifted") {
      const std::size_t row = 3 * static_cast<std::size_t>(image.width);
      out.rgb[i] = image.rgb[i / row * row + (i % row + row - 3) % row];
    } else if (kind == "darker") {
      out.rgb[i] = static_cast<std::uint8_t>(value * 3 / 4);
    } else {
      EXPECT_EQ(kind, "inverted");
      out.rgb[i] = static_cast<std::uint8_t>(255 - value);
    }
  }
  return out;
}

TEST(Quality, AgreesWithScikitImage) {
  std::ifstream file(testing::data_dir() + "/image-quality/expected.csv");
  std::string line;
  std::getline(file, line);  // where it is from
  std::getline(file, line);
  ASSERT_EQ(line, "width,height,change,psnr,ssim");
  int rows = 0;
  for (; std::getline(file, line); ++rows) {
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream fields(line);
    int width = 0, height = 0;
    std::string kind;
    double expected_psnr = 0, expected_ssim = 0;
    ASSERT_TRUE(fields >> width >> height >> kind >> expected_psnr >> expected_ssim) << line;
    const Image a = formula_picture(width, height);
    const Image b = changed(a, kind);
    EXPECT_NEAR(psnr(a, b), expected_psnr, 1e-4) << line;
    EXPECT_NEAR(ssim(a, b), expected_ssim, 1e-4) << line;
  }
  EXPECT_EQ(rows, 21);
}

TEST(Quality, RefusesPicturesOfOtherSizes) {
  EXPECT_THROW(psnr(random_image(4, 3, 1), random_image(3, 4, 1)), Error);
  EXPECT_THROW(ssim(random_image(20, 30, 1), random_image(30, 20, 1)), Error);
  EXPECT_THROW(ssim(random_image(10, 30, 1), random_image(10, 30, 1)), Error);
  EXPECT_THROW(psnr({}, {}), Error);
}

}  // namespace
}  // namespace sparvar
