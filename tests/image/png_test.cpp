// PNG reading against files that libpng writes here from every kind of pixel, and hostile files.
#include <gtest/gtest.h>
#include <png.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>

#include "image/random_image.h"
#include "sparvar/error.h"
#include "sparvar/image.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

using testing::random_image;

using testing::TempFolder;
using Bytes = std::vector<std::uint8_t>;

Bytes random_bytes(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  Bytes bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(generator() >> 7);
  return bytes;
}

Bytes contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void put(const std::string& path, const Bytes& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

/// Writes rows of any format straight through libpng. `prepare` may add a palette or a transparent colour.
void write_raw(const std::string& path, int width, int height, int depth, int color, const Bytes& bytes,
               const std::function<void(png_structp, png_infop)>& prepare = {}, int interlace = PNG_INTERLACE_NONE) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "wb"), std::fclose);
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  png_init_io(png, file.get());
  png_set_IHDR(png, info, static_cast<png_uint_32>(width), static_cast<png_uint_32>(height), depth, color, interlace,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  if (prepare) prepare(png, info);
  png_write_info(png, info);
  const std::size_t row = bytes.size() / static_cast<std::size_t>(height);
  std::vector<png_bytep> rows;
  for (std::size_t y = 0; y < static_cast<std::size_t>(height); ++y)
    rows.push_back(const_cast<png_bytep>(bytes.data() + y * row));
  png_write_image(png, rows.data());
  png_write_end(png, nullptr);
  png_destroy_write_struct(&png, &info);
}

int on_white(int value, int alpha) {
  return static_cast<int>(std::lround((value * alpha + 255.0 * (255 - alpha)) / 255.0));
}

TEST(Png, KeepsEveryPixel) {
  const TempFolder folder;
  for (const auto& [width, height] : {std::pair{1, 1}, {7, 5}, {64, 33}, {1, 300}, {513, 2}}) {
    const Image image = random_image(width, height, static_cast<unsigned>(width));
    write_png(folder.path("a.png"), image);
    const Image back = read_png(folder.path("a.png"));
    EXPECT_EQ(back.width, width);
    EXPECT_EQ(back.height, height);
    EXPECT_EQ(back.rgb, image.rgb);
  }
}

TEST(Png, TheSamePictureGivesTheSameFile) {
  const TempFolder folder;
  const Image image = random_image(40, 30, 1);
  write_png(folder.path("a.png"), image, {{"prompt", "one"}});
  write_png(folder.path("b.png"), image, {{"prompt", "one"}});
  EXPECT_EQ(contents(folder.path("a.png")), contents(folder.path("b.png")));
}

TEST(Png, HoldsTextInUtf8) {
  const TempFolder folder;
  const std::string prompt = "gr\xC3\xBC\xC3\x9F\x65, \xF0\x9F\x98\x80\nsecond line";
  write_png(folder.path("a.png"), random_image(4, 4, 1), {{"prompt", prompt}, {"seed", "7"}, {"empty", ""}});

  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(folder.path("a.png").c_str(), "rb"),
                                                             std::fclose);
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  png_init_io(png, file.get());
  png_read_info(png, info);
  png_textp texts = nullptr;
  int count = 0;
  png_get_text(png, info, &texts, &count);
  ASSERT_EQ(count, 3);
  EXPECT_STREQ(texts[0].key, "prompt");
  EXPECT_EQ(texts[0].text, prompt);
  EXPECT_STREQ(texts[1].text, "7");
  EXPECT_STREQ(texts[2].text, "");
  png_destroy_read_struct(&png, &info, nullptr);
}

TEST(Png, RefusesKeywordsThatPngCannotHold) {
  const TempFolder folder;
  for (const std::string& key : {std::string(), std::string(80, 'a'), std::string(" a"), std::string("a\nb")})
    EXPECT_THROW(write_png(folder.path("a.png"), random_image(2, 2, 1), {{key, "x"}}), Error) << key;
  EXPECT_TRUE(folder.names().empty());
}

TEST(Png, RefusesPicturesOfAnImpossibleSize) {
  const TempFolder folder;
  EXPECT_THROW(write_png(folder.path("a.png"), {0, 0, {}}), Error);
  EXPECT_THROW(write_png(folder.path("a.png"), {2, 2, Bytes(11)}), Error);
  EXPECT_THROW(write_png(folder.path("a.png"), {-1, -1, Bytes(3)}), Error);
  EXPECT_THROW(write_png(folder.path("a.png"), {2000000, 1, Bytes(6000000)}), Error);  // libpng's own limit
  EXPECT_TRUE(folder.names().empty());
}

TEST(Png, ReadsAlphaOnWhite) {
  const TempFolder folder;
  const Bytes rgba = random_bytes(9 * 7 * 4, 3);
  for (const int interlace : {PNG_INTERLACE_NONE, PNG_INTERLACE_ADAM7}) {
    write_raw(folder.path("a.png"), 9, 7, 8, PNG_COLOR_TYPE_RGB_ALPHA, rgba, {}, interlace);
    const Image image = read_png(folder.path("a.png"));
    ASSERT_EQ(image.rgb.size(), 9U * 7 * 3);
    for (std::size_t i = 0; i < 63; ++i)
      for (std::size_t c = 0; c < 3; ++c)
        ASSERT_EQ(image.rgb[3 * i + c], on_white(rgba[4 * i + c], rgba[4 * i + 3])) << i;
  }
}

TEST(Png, ReadsPalettesOfEveryDepth) {
  const TempFolder folder;
  for (const int depth : {1, 2, 4, 8}) {
    const Bytes colors = random_bytes(3U << depth, 4);
    const Bytes alphas = random_bytes(2, 5);  // of the first two entries
    const auto prepare = [&](png_structp png, png_infop info) {
      std::vector<png_color> palette;
      for (std::size_t i = 0; i < colors.size(); i += 3) palette.push_back({colors[i], colors[i + 1], colors[i + 2]});
      png_set_PLTE(png, info, palette.data(), static_cast<int>(palette.size()));
      png_set_tRNS(png, info, alphas.data(), 2, nullptr);
    };
    const int width = 16;
    const Bytes packed = random_bytes(static_cast<std::size_t>(width * depth / 8) * 3, 6);
    write_raw(folder.path("a.png"), width, 3, depth, PNG_COLOR_TYPE_PALETTE, packed, prepare);
    const Image image = read_png(folder.path("a.png"));
    ASSERT_EQ(image.rgb.size(), 48U * 3);
    for (std::size_t i = 0; i < 48; ++i) {
      const std::size_t bit = i * static_cast<std::size_t>(depth);
      const unsigned index = (packed[bit / 8] >> (8 - static_cast<std::size_t>(depth) - bit % 8)) & ((1U << depth) - 1);
      for (std::size_t c = 0; c < 3; ++c)
        ASSERT_EQ(image.rgb[3 * i + c], on_white(colors[3 * index + c], index < 2 ? alphas[index] : 255))
            << depth << " " << i;
    }
  }
}

TEST(Png, ReadsGrayAnd16Bits) {
  const TempFolder folder;
  const Bytes gray = random_bytes(35, 7);
  write_raw(folder.path("gray.png"), 7, 5, 8, PNG_COLOR_TYPE_GRAY, gray);
  const Image from_gray = read_png(folder.path("gray.png"));
  for (std::size_t i = 0; i < 35 * 3; ++i) ASSERT_EQ(from_gray.rgb[i], gray[i / 3]);

  write_raw(folder.path("bits.png"), 8, 1, 1, PNG_COLOR_TYPE_GRAY, {0xA5});
  const Image from_bits = read_png(folder.path("bits.png"));
  for (std::size_t i = 0; i < 24; ++i) ASSERT_EQ(from_bits.rgb[i], (0xA5 >> (7 - i / 3)) & 1 ? 255 : 0);

  const Bytes deep = random_bytes(7 * 5 * 6, 8);
  write_raw(folder.path("deep.png"), 7, 5, 16, PNG_COLOR_TYPE_RGB, deep);
  const Image from_deep = read_png(folder.path("deep.png"));
  for (std::size_t i = 0; i < 35 * 3; ++i) {
    const int value = deep[2 * i] * 256 + deep[2 * i + 1];
    ASSERT_EQ(from_deep.rgb[i], std::lround(value / 257.0)) << i;
  }

  const Bytes gray_alpha = random_bytes(7 * 5 * 2, 9);
  write_raw(folder.path("ga.png"), 7, 5, 8, PNG_COLOR_TYPE_GRAY_ALPHA, gray_alpha);
  const Image from_ga = read_png(folder.path("ga.png"));
  for (std::size_t i = 0; i < 35 * 3; ++i)
    ASSERT_EQ(from_ga.rgb[i], on_white(gray_alpha[i / 3 * 2], gray_alpha[i / 3 * 2 + 1])) << i;
}

/// What reading says; empty where it is read.
std::string complaint(const std::string& path) {
  try {
    read_png(path);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "";
}

TEST(Png, NamesTheFileAndTheFault) {
  const TempFolder folder;
  const std::string path = folder.path("a.png");
  EXPECT_NE(complaint(path).find("no such file"), std::string::npos);
  EXPECT_NE(complaint(path).find(path), std::string::npos);
  EXPECT_NE(complaint(folder.path()).find("a folder"), std::string::npos);
  put(path, {});
  EXPECT_NE(complaint(path).find("not a PNG"), std::string::npos);
  put(path, Bytes(100, 'x'));
  EXPECT_NE(complaint(path).find("not a PNG"), std::string::npos);
}

TEST(Png, TruncatedFilesAreRefusedAtEveryLength) {
  const TempFolder folder;
  const std::string path = folder.path("a.png");
  write_png(path, random_image(20, 20, 2));
  const Bytes whole = contents(path);
  for (std::size_t length = 0; length + 12 < whole.size(); length += 7) {  // the end chunk itself holds nothing
    put(path, Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length)));
    EXPECT_NE(complaint(path), "") << length;
  }
}

TEST(Png, DamagedFilesNeverCrash) {
  const TempFolder folder;
  const std::string path = folder.path("a.png");
  write_png(path, random_image(20, 20, 2));
  const Bytes whole = contents(path);
  std::mt19937 generator(11);
  for (int round = 0; round < 200; ++round) {
    Bytes damaged = whole;
    damaged[8 + generator() % (damaged.size() - 8)] ^= static_cast<std::uint8_t>(1U << (generator() % 8));
    put(path, damaged);
    complaint(path);
  }
}

TEST(Png, HugeSizesAreRefusedBeforeMemoryIsAskedFor) {
  const TempFolder folder;
  const std::string path = folder.path("a.png");
  // A header alone decides; the rows are those of a picture of one row.
  for (const auto& [width, height] : {std::pair<png_uint_32, png_uint_32>{40000, 1}, {30000, 30000}}) {
    write_png(path, random_image(1, 1, 1));
    Bytes bytes = contents(path);
    png_save_uint_32(bytes.data() + 16, width);
    png_save_uint_32(bytes.data() + 20, height);
    png_uint_32 crc = 0xffffffffU;  // of IHDR's type and 13 bytes
    for (std::size_t i = 12; i < 29; ++i) {
      crc ^= bytes[i];
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xedb88320U : 0U);
    }
    png_save_uint_32(bytes.data() + 29, ~crc);
    put(path, bytes);
    EXPECT_NE(complaint(path), "") << width;
  }
}

}  // namespace
}  // namespace sparvar
