// The picture of a mask, pixel by pixel.
#include "pipeline/mask_picture.h"

#include <gtest/gtest.h>

#include "image/canvas.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

const ScaleSchedule kSchedule = {{1, 1}, {2, 2}, {3, 3}};
constexpr Colour kPaper{255, 255, 255};

/// Tiles {0 .. 4} and {5 .. 8} of the last scale; the first reads keys 0 and 5 .. 7, the second key 3.
Mask small_mask() {
  Mask mask{{{0, 5, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 8}}, {}};
  mask.lists.tiles = 2;
  mask.lists.offset = {0, 2, 3};
  mask.lists.runs = {{0, 1}, {5, 3}, {3, 1}};
  return mask;
}

TEST(MaskPicture, HasAPixelForEveryPairAndALineBeforeEveryScale) {
  const MaskLayout layout = mask_layout(kSchedule, 2, 1);
  EXPECT_EQ(layout.column, (std::vector<int>{0, 2, 7}));
  EXPECT_EQ(layout.width, 16);
  const Image image = draw_mask(small_mask(), kSchedule, 2, 1);
  ASSERT_EQ(image.width, 16);
  ASSERT_EQ(image.height, layout.top + 9);
  const int columns[14] = {0, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int q = 0; q < 9; ++q) {
    for (int key = 0; key < 14; ++key) {
      const bool read = q < 5 ? key == 0 || (key >= 5 && key < 8) : key == 3;
      EXPECT_EQ(pixel(image, columns[key], layout.top + q) != kPaper, read) << q << ", " << key;
    }
    for (const int line : {1, 6}) {
      EXPECT_NE(pixel(image, line, layout.top + q), kPaper);
      EXPECT_EQ(pixel(image, line, layout.top + q), pixel(image, 1, layout.top));
    }
  }
}

TEST(MaskPicture, ShadesByTheShareOfPairs) {
  const MaskLayout layout = mask_layout(kSchedule, 2, 3);
  EXPECT_EQ(layout.column, (std::vector<int>{0, 2, 5}));  // 1, 2 and 3 pixels
  EXPECT_EQ(layout.height - layout.top, 3);
  const Image image = draw_mask(small_mask(), kSchedule, 2, 3);
  const auto ink = [&](int x, int y) { return 255 - pixel(image, x, layout.top + y).r; };
  EXPECT_GT(ink(5, 0), 200);        // keys 5 .. 7 of queries 0 .. 2: all
  EXPECT_GT(ink(5, 0), ink(5, 1));  // queries 3 .. 5: two of three
  EXPECT_GT(ink(5, 1), 0);          //
  EXPECT_EQ(ink(5, 2), 0);          // queries 6 .. 8: none
  EXPECT_GT(ink(2, 2), 0);          // key 3
  EXPECT_GT(ink(0, 0), 200);        // scale 0 is one key, not a third of a pixel
  EXPECT_EQ(ink(6, 0), 0);
}

TEST(MaskPicture, ChoosesTokensForAWidth) {
  for (const int side : {16, 12, 8}) {
    const int tokens = tokens_per_pixel_for(kSchedule, 2, side);
    EXPECT_LE(mask_layout(kSchedule, 2, tokens).width, side);
    EXPECT_TRUE(tokens == 1 || mask_layout(kSchedule, 2, tokens - 1).width > side);
  }
  EXPECT_EQ(tokens_per_pixel_for(kSchedule, 2, 1), 9);  // as small as it gets
  EXPECT_THROW(mask_layout({{300, 300}}, 0, 1), Error);
}

}  // namespace
}  // namespace sparvar
