// Pictures put together, letters included.
#include "image/canvas.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "image/resize.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr Colour kWhite{255, 255, 255};
constexpr Colour kBlack{0, 0, 0};

int dark_pixels(const Image& image) {
  int count = 0;
  for (int y = 0; y < image.height; ++y)
    for (int x = 0; x < image.width; ++x) count += pixel(image, x, y) == kBlack ? 1 : 0;
  return count;
}

Image written(const std::string& text, int size = 1) {
  Image image = blank(kCellWidth * size * std::max(characters(text), 1), kCellHeight * size, kWhite);
  draw_text(image, 0, 0, text, size, kBlack);
  return image;
}

TEST(Canvas, FillsAndPastesWhatIsInside) {
  Image image = blank(4, 3, kWhite);
  fill(image, -2, 1, 4, 9, {1, 2, 3});
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 4; ++x) EXPECT_EQ(pixel(image, x, y), (y >= 1 && x < 2 ? Colour{1, 2, 3} : kWhite));
  Image part = blank(3, 2, kBlack);
  fill(part, 2, 1, 1, 1, {9, 9, 9});
  paste(image, part, -2, -1);
  EXPECT_EQ(pixel(image, 0, 0), (Colour{9, 9, 9}));
  EXPECT_EQ(pixel(image, 1, 0), kWhite);
  paste(image, part, 3, 2);
  EXPECT_EQ(pixel(image, 3, 2), kBlack);
  paste(image, part, 50, 50);
  paste(image, part, -50, 0);
}

TEST(Canvas, DifferencesAreAmplifiedAroundGray) {
  const Image a{2, 1, {10, 100, 200, 0, 0, 255}};
  const Image b{2, 1, {10, 102, 190, 255, 1, 0}};
  EXPECT_EQ(amplified_difference(a, b, 4).rgb, (std::vector<std::uint8_t>{128, 136, 88, 255, 132, 0}));
  EXPECT_THROW(amplified_difference(a, {1, 2, a.rgb}, 4), Error);
}

TEST(Font, EveryCharacterHasAShapeOfItsOwn) {
  std::set<std::string> shapes;
  const auto add = [&](const std::string& text) {
    const Image image = written(text);
    shapes.emplace(image.rgb.begin(), image.rgb.end());
  };
  for (char c = ' '; c <= '~'; ++c) add(std::string(1, c));
  add("\u00e9");  // the box
  EXPECT_EQ(shapes.size(), 96U);
  EXPECT_EQ(dark_pixels(written(" ")), 0);
}

TEST(Font, StaysInItsCellAndGrows) {
  for (char c = '!'; c <= '~'; ++c) {
    const Image image = written(std::string(1, c));
    for (int y = 0; y < kCellHeight; ++y) EXPECT_EQ(pixel(image, kCellWidth - 1, y), kWhite) << c;
    for (int x = 0; x < kCellWidth; ++x) EXPECT_EQ(pixel(image, x, kCellHeight - 1), kWhite) << c;
    EXPECT_EQ(dark_pixels(written(std::string(1, c), 3)), 9 * dark_pixels(image)) << c;
  }
}

TEST(Font, DrawsWhereItIsTold) {
  // An L: a bar down the left, a bar at the bottom.
  Image image = blank(20, 20, kWhite);
  draw_text(image, 7, 4, "L", 1, kBlack);
  for (int y = 0; y < 20; ++y)
    for (int x = 0; x < 20; ++x) {
      const bool bar = (x == 7 && y >= 4 && y < 11) || (y == 10 && x >= 7 && x < 12);
      EXPECT_EQ(pixel(image, x, y) == kBlack, bar) << x << ", " << y;
    }
  draw_text(image, -3, 18, "outside", 4, kBlack);  // cut off, not written elsewhere
}

TEST(Font, CountsAndWrapsCharacters) {
  EXPECT_EQ(characters("a\u00e9\U0001F600"), 3);
  EXPECT_EQ(wrapped("red heart, noto style", 10), (std::vector<std::string>{"red heart,", "noto style"}));
  EXPECT_EQ(wrapped("red heart", 5), (std::vector<std::string>{"red", "heart"}));
  EXPECT_EQ(wrapped("abcdefgh", 3), (std::vector<std::string>{"abc", "def", "gh"}));
  EXPECT_EQ(wrapped("\u00e9\u00e9\u00e9", 2), (std::vector<std::string>{"\u00e9\u00e9", "\u00e9"}));
  EXPECT_EQ(wrapped("", 5), (std::vector<std::string>{""}));
}

TEST(Resize, KeepsEvenColoursAndMeans) {
  const Image even = resize_lanczos(blank(31, 17, {7, 130, 255}), 12, 40);
  EXPECT_EQ(even.rgb, blank(12, 40, {7, 130, 255}).rgb);
  Image steps = blank(64, 8, kBlack);
  fill(steps, 32, 0, 32, 8, {200, 200, 200});
  const Image small = resize_lanczos(steps, 8, 1);
  for (const int x : {0, 1}) EXPECT_LE(pixel(small, x, 0).r, 5) << x;
  for (const int x : {6, 7}) EXPECT_NEAR(pixel(small, x, 0).r, 200, 5) << x;
  for (int x = 0; x < 4; ++x) EXPECT_NEAR(pixel(small, x, 0).r + pixel(small, 7 - x, 0).r, 200, 6) << x;
}

TEST(Resize, OfTheSameSizeChangesNothing) {
  Image image{5, 4, {}};
  for (int i = 0; i < 60; ++i) image.rgb.push_back(static_cast<std::uint8_t>(i * 37));
  EXPECT_EQ(resize_lanczos(image, 5, 4).rgb, image.rgb);
  EXPECT_THROW(resize_lanczos(image, 0, 4), Error);
}

TEST(Resize, CoverTakesTheMiddle) {
  Image wide = blank(40, 10, {255, 0, 0});
  fill(wide, 15, 0, 10, 10, {0, 0, 255});
  const Image square = cover(wide, 10, 10);
  for (int y = 0; y < 10; ++y)
    for (int x = 0; x < 10; ++x) EXPECT_EQ(pixel(square, x, y), (Colour{0, 0, 255}));
  Image tall = blank(6, 24, {255, 0, 0});
  fill(tall, 0, 9, 6, 6, {0, 255, 0});
  const Image large = cover(tall, 12, 12);
  EXPECT_EQ(pixel(large, 6, 6), (Colour{0, 255, 0}));
  EXPECT_EQ(large.width, 12);
  EXPECT_EQ(cover(tall, 6, 24).rgb, tall.rgb);
}

}  // namespace
}  // namespace sparvar
