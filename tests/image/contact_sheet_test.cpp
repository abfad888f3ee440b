// Contact sheets: where each picture lies, and how small it becomes.
#include "image/contact_sheet.h"

#include <gtest/gtest.h>

#include "sparvar/error.h"

namespace sparvar {
namespace {

Image plain(int width, int height, std::uint8_t value) {
  return {width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height) * 3, value)};
}

int at(const Image& image, int x, int y) { return image.rgb[static_cast<std::size_t>(y * image.width + x) * 3]; }

TEST(ContactSheet, RowsOfPicturesOnWhite) {
  const Image a = plain(20, 10, 1), b = plain(20, 10, 2), c = plain(10, 10, 3);
  const Image sheet = contact_sheet({&a, &b, &c});
  EXPECT_EQ(sheet.width, 8 + 2 * 28);
  EXPECT_EQ(sheet.height, 8 + 2 * 18);
  EXPECT_EQ(at(sheet, 7, 8), 255);
  EXPECT_EQ(at(sheet, 8, 8), 1);
  EXPECT_EQ(at(sheet, 27, 17), 1);
  EXPECT_EQ(at(sheet, 36, 8), 2);
  EXPECT_EQ(at(sheet, 12, 26), 255) << "a narrower picture is centred";
  EXPECT_EQ(at(sheet, 13, 26), 3);
  EXPECT_EQ(at(sheet, 40, 30), 255) << "an empty cell";
  EXPECT_EQ(contact_sheet({&a, &b, &c}, 1).height, 8 + 3 * 18);
  EXPECT_THROW(contact_sheet({}), Error);
}

TEST(ContactSheet, StaysSmall) {
  const Image a = plain(300, 100, 9);
  const std::vector<const Image*> many(200, &a);
  const Image sheet = contact_sheet(many, 0, 1000);
  EXPECT_LE(sheet.width, 1000);
  EXPECT_LE(sheet.height, 1000);
  EXPECT_EQ(at(sheet, 8, 8 + (sheet.height - 8) / 14 / 2 - 8), 9);
}

TEST(ContactSheet, ShrinkingTakesMeans) {
  Image image = plain(4, 2, 0);
  for (std::size_t i = 0; i < image.rgb.size(); ++i) image.rgb[i] = static_cast<std::uint8_t>(i / 3 * 10);
  const Image half = shrunk(image, 2, 1);
  EXPECT_EQ(at(half, 0, 0), (0 + 10 + 40 + 50) / 4);
  EXPECT_EQ(at(half, 1, 0), (20 + 30 + 60 + 70) / 4);
  EXPECT_EQ(shrunk(image, 9, 9).rgb, image.rgb) << "never enlarged";
}

}  // namespace
}  // namespace sparvar
