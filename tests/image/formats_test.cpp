// JPEG and WebP: what is written is read again; what other programs and hostile people write; EXIF; metadata.
#include <gtest/gtest.h>
#include <jpeglib.h>
#include <webp/mux.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <random>

#include "image/orientation.h"
#include "sparvar/error.h"
#include "sparvar/image.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

using testing::TempFolder;
using Bytes = std::vector<std::uint8_t>;

/// Waves of colour: lossy formats keep them well.
Image smooth_image(int width, int height) {
  Image image{width, height, {}};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < 3; ++c)
        image.rgb.push_back(static_cast<std::uint8_t>(128 + 100 * std::sin(0.11 * x + 0.05 * c) * std::cos(0.07 * y)));
  return image;
}

Bytes contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void put(const std::string& path, const Bytes& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

/// What reading says; empty where the file is read.
std::string complaint(const std::string& path) {
  try {
    read_image(path);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}

/// A TIFF block of one entry: the orientation, in either byte order.
Bytes exif_of(int orientation, bool little) {
  const auto v = static_cast<std::uint8_t>(orientation);
  if (little) return {'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, v, 0, 0, 0, 0, 0, 0, 0};
  return {'M', 'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, v, 0, 0, 0, 0, 0, 0};
}

/// A JPEG straight through libjpeg; `prepare` comes before it starts, `markers` after.
void write_raw_jpeg(const std::string& path, const Bytes& pixels, int width, int height, int components,
                    J_COLOR_SPACE space, const std::function<void(jpeg_compress_struct&)>& prepare = {},
                    const std::function<void(jpeg_compress_struct&)>& markers = {}) {
  jpeg_compress_struct codec;
  jpeg_error_mgr error;
  codec.err = jpeg_std_error(&error);
  jpeg_create_compress(&codec);
  std::FILE* file = std::fopen(path.c_str(), "wb");
  jpeg_stdio_dest(&codec, file);
  codec.image_width = static_cast<JDIMENSION>(width);
  codec.image_height = static_cast<JDIMENSION>(height);
  codec.input_components = components;
  codec.in_color_space = space;
  jpeg_set_defaults(&codec);
  jpeg_set_quality(&codec, 98, TRUE);
  if (prepare) prepare(codec);
  jpeg_start_compress(&codec, TRUE);
  if (markers) markers(codec);
  while (codec.next_scanline < codec.image_height) {
    auto* row = const_cast<JSAMPROW>(pixels.data() + std::size_t{codec.next_scanline} * codec.image_width *
                                                         static_cast<std::size_t>(components));
    jpeg_write_scanlines(&codec, &row, 1);
  }
  jpeg_finish_compress(&codec);
  jpeg_destroy_compress(&codec);
  std::fclose(file);
}

TEST(Formats, WrittenPicturesComeBack) {
  const TempFolder folder;
  for (const auto& [width, height] : {std::pair{1, 1}, {7, 5}, {64, 33}, {1, 300}}) {
    const Image image = smooth_image(width, height);
    for (const ImageFormat format : {ImageFormat::png, ImageFormat::jpeg, ImageFormat::webp}) {
      const std::string path = folder.path("picture");  // the name says nothing: the bytes do
      write_image(path, image, format, {}, 95);
      const Image back = read_image(path);
      ASSERT_EQ(back.width, width);
      ASSERT_EQ(back.height, height);
      EXPECT_GT(psnr(image, back), 35) << name_of(format) << " " << width;
    }
    write_image(folder.path("lossless"), image, ImageFormat::webp, {}, 100);
    EXPECT_EQ(read_image(folder.path("lossless")).rgb, image.rgb);
  }
}

TEST(Formats, QualityTradesSizeForFidelity) {
  const TempFolder folder;
  const Image image = smooth_image(200, 200);
  for (const ImageFormat format : {ImageFormat::jpeg, ImageFormat::webp}) {
    write_image(folder.path("low"), image, format, {}, 20);
    write_image(folder.path("high"), image, format, {}, 95);
    EXPECT_LT(contents(folder.path("low")).size(), contents(folder.path("high")).size());
    EXPECT_LT(psnr(image, read_image(folder.path("low"))), psnr(image, read_image(folder.path("high"))));
    EXPECT_THROW(write_image(folder.path("x"), image, format, {}, 0), Error);
    EXPECT_THROW(write_image(folder.path("x"), image, format, {}, 101), Error);
  }
}

TEST(Formats, EveryFormatKeepsTheSameTexts) {
  const TempFolder folder;
  const ImageMetadata texts = {{"Software", "sparvar"},
                               {"prompt", "gr\xC3\xBC\xC3\x9F\x65 <b>&amp;</b> \xF0\x9F\x98\x80\n\x01 \"quoted\""},
                               {"empty", ""},
                               {"long", std::string(200'000, 'x') + "end"},  // more than one JPEG segment holds
                               {"a first", "keys keep their order"}};
  for (const ImageFormat format : {ImageFormat::png, ImageFormat::jpeg, ImageFormat::webp}) {
    write_image(folder.path("a"), smooth_image(20, 10), format, texts);
    EXPECT_EQ(read_image_metadata(folder.path("a")), texts) << name_of(format);
    EXPECT_EQ(read_image(folder.path("a")).width, 20);
    write_image(folder.path("bare"), smooth_image(20, 10), format);
    EXPECT_TRUE(read_image_metadata(folder.path("bare")).empty());
    EXPECT_THROW(write_image(folder.path("x"), smooth_image(2, 2), format, {{"", "x"}}), Error);
  }
  write_raw_jpeg(folder.path("other"), Bytes(12), 2, 2, 3, JCS_RGB, {}, [](jpeg_compress_struct& codec) {
    jpeg_write_marker(&codec, JPEG_COM, reinterpret_cast<const JOCTET*>("by hand"), 7);
  });
  EXPECT_EQ(read_image_metadata(folder.path("other")), (ImageMetadata{{"Comment", "by hand"}}));
}

TEST(Formats, FollowTheExtension) {
  EXPECT_EQ(format_of("a/b.PNG"), ImageFormat::png);
  EXPECT_EQ(format_of("b.jpg"), ImageFormat::jpeg);
  EXPECT_EQ(format_of("b.JPEG"), ImageFormat::jpeg);
  EXPECT_EQ(format_of("b.webp"), ImageFormat::webp);
  EXPECT_THROW(format_of("b.gif"), Error);
  EXPECT_THROW(format_of("png"), Error);
}

TEST(Orientation, TurnsEveryWay) {
  // 3 x 2: A B C / D E F, a byte a pixel.
  const auto picture = [](const std::string& letters, int width) {
    Image image{width, static_cast<int>(letters.size()) / width, {}};
    for (const char letter : letters) image.rgb.insert(image.rgb.end(), 3, static_cast<std::uint8_t>(letter));
    return image;
  };
  const std::pair<int, const char*> expected[] = {{3, "ABCDEF"}, {3, "CBAFED"}, {3, "FEDCBA"}, {3, "DEFABC"},
                                                  {2, "ADBECF"}, {2, "DAEBFC"}, {2, "FCEBDA"}, {2, "CFBEAD"}};
  for (int orientation = 1; orientation <= 8; ++orientation) {
    const auto& [width, letters] = expected[orientation - 1];
    const Image turned = oriented(picture("ABCDEF", 3), orientation);
    EXPECT_EQ(turned.width, width) << orientation;
    EXPECT_EQ(turned.rgb, picture(letters, width).rgb) << orientation;
    EXPECT_EQ(exif_orientation(exif_of(orientation, true)), orientation);
    EXPECT_EQ(exif_orientation(exif_of(orientation, false)), orientation);
  }
}

TEST(Orientation, DamagedExifIsNone) {
  const Bytes whole = exif_of(6, true);
  for (std::size_t length = 0; length < 20; ++length)
    EXPECT_EQ(exif_orientation({whole.data(), std::min<std::size_t>(length, 18)}), 1) << length;
  EXPECT_EQ(exif_orientation(exif_of(0, true)), 1);
  EXPECT_EQ(exif_orientation(exif_of(9, false)), 1);
  std::mt19937 generator(3);
  for (int round = 0; round < 2000; ++round) {
    Bytes damaged = exif_of(6, round % 2 == 0);
    for (int i = 0; i < 3; ++i) damaged[generator() % damaged.size()] = static_cast<std::uint8_t>(generator());
    const int orientation = exif_orientation(damaged);
    EXPECT_TRUE(orientation >= 1 && orientation <= 8);
  }
}

TEST(Orientation, IsAppliedInEveryFormat) {
  const TempFolder folder;
  const Image image = smooth_image(40, 20);
  Bytes app1 = {'E', 'x', 'i', 'f', 0, 0};
  const Bytes exif = exif_of(6, false);
  app1.insert(app1.end(), exif.begin(), exif.end());
  write_raw_jpeg(folder.path("a.jpg"), image.rgb, 40, 20, 3, JCS_RGB, {}, [&](jpeg_compress_struct& codec) {
    jpeg_write_marker(&codec, JPEG_APP0 + 1, app1.data(), static_cast<unsigned>(app1.size()));
  });
  write_image(folder.path("plain.webp"), image, ImageFormat::webp, {}, 100);
  const Bytes plain = contents(folder.path("plain.webp"));
  WebPMux* mux = WebPMuxNew();
  const WebPData pixels{plain.data(), plain.size()};
  const WebPData chunk{exif.data(), exif.size()};
  WebPData file{};
  ASSERT_EQ(WebPMuxSetImage(mux, &pixels, 0), WEBP_MUX_OK);
  ASSERT_EQ(WebPMuxSetChunk(mux, "EXIF", &chunk, 0), WEBP_MUX_OK);
  ASSERT_EQ(WebPMuxAssemble(mux, &file), WEBP_MUX_OK);
  put(folder.path("a.webp"), {file.bytes, file.bytes + file.size});
  WebPDataClear(&file);
  WebPMuxDelete(mux);
  const Image turned = oriented(image, 6);
  for (const char* name : {"a.jpg", "a.webp"}) {
    const Image back = read_image(folder.path(name));
    ASSERT_EQ(back.width, 20) << name;
    ASSERT_EQ(back.height, 40) << name;
    EXPECT_GT(psnr(turned, back), 35) << name;
  }
}

TEST(Jpeg, ReadsGrayProgressiveAndCmyk) {
  const TempFolder folder;
  const Image image = smooth_image(48, 32);
  Bytes gray(48 * 32), inks(48 * 32 * 4);
  Image gray_rgb = image;
  for (std::size_t i = 0; i < gray.size(); ++i) {
    gray[i] = image.rgb[3 * i];
    for (std::size_t c = 0; c < 3; ++c) {
      gray_rgb.rgb[3 * i + c] = gray[i];
      inks[4 * i + c] = image.rgb[3 * i + c];  // upside down, as Adobe writes it: 255 is no ink
    }
    inks[4 * i + 3] = 255;
  }
  write_raw_jpeg(folder.path("gray"), gray, 48, 32, 1, JCS_GRAYSCALE);
  EXPECT_GT(psnr(gray_rgb, read_image(folder.path("gray"))), 40);
  write_raw_jpeg(folder.path("progressive"), image.rgb, 48, 32, 3, JCS_RGB,
                 [](jpeg_compress_struct& codec) { jpeg_simple_progression(&codec); });
  EXPECT_GT(psnr(image, read_image(folder.path("progressive"))), 35);
  for (const J_COLOR_SPACE space : {JCS_CMYK, JCS_YCCK}) {  // libjpeg marks both as Adobe's
    write_raw_jpeg(folder.path("cmyk"), inks, 48, 32, 4, JCS_CMYK,
                   [space](jpeg_compress_struct& codec) { jpeg_set_colorspace(&codec, space); });
    EXPECT_GT(psnr(image, read_image(folder.path("cmyk"))), 35) << space;
  }
}

TEST(Formats, TruncatedFilesAreRefused) {
  const TempFolder folder;
  for (const ImageFormat format : {ImageFormat::jpeg, ImageFormat::webp}) {
    write_image(folder.path("a"), smooth_image(60, 40), format, {{"prompt", "x"}});
    const Bytes whole = contents(folder.path("a"));
    const std::size_t end = format == ImageFormat::jpeg ? whole.size() - 2 : 200;  // WebP: its texts come last
    for (std::size_t length = 0; length < end; length += 13) {
      put(folder.path("b"), Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length)));
      EXPECT_NE(complaint(folder.path("b")), "") << name_of(format) << " " << length;
    }
  }
}

TEST(Formats, DamagedFilesNeverCrash) {
  const TempFolder folder;
  for (const ImageFormat format : {ImageFormat::png, ImageFormat::jpeg, ImageFormat::webp}) {
    write_image(folder.path("a"), smooth_image(30, 20), format, {{"prompt", "x"}});
    const Bytes whole = contents(folder.path("a"));
    std::mt19937 generator(11);
    for (int round = 0; round < 300; ++round) {
      Bytes damaged = whole;
      for (int i = 0; i < 2; ++i)
        damaged[12 + generator() % (damaged.size() - 12)] = static_cast<std::uint8_t>(generator());
      put(folder.path("b"), damaged);
      complaint(folder.path("b"));
      try {
        read_image_metadata(folder.path("b"));
      } catch (const Error&) {
      }
    }
  }
}

TEST(Formats, OtherFilesAreNamedForWhatTheyAre) {
  const TempFolder folder;
  const std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\"/>";
  put(folder.path("drawing.png"), Bytes(svg.begin(), svg.end()));
  EXPECT_NE(complaint(folder.path("drawing.png")).find("begins with '<svg"), std::string::npos);
  put(folder.path("empty.jpg"), {});
  EXPECT_NE(complaint(folder.path("empty.jpg")).find("empty"), std::string::npos);
  EXPECT_NE(complaint(folder.path("none.webp")).find("no such file"), std::string::npos);
  EXPECT_NE(complaint(folder.path()).find("a folder"), std::string::npos);
  EXPECT_NE(complaint("/dev/null").find("not a file"), std::string::npos);
}

TEST(Jpeg, HugeSizesAreRefusedBeforeMemoryIsAskedFor) {
  const TempFolder folder;
  write_image(folder.path("a"), smooth_image(16, 16), ImageFormat::jpeg);
  Bytes bytes = contents(folder.path("a"));
  for (std::size_t i = 0; i + 9 < bytes.size(); ++i)
    if (bytes[i] == 0xFF && bytes[i + 1] == 0xC0)  // the frame: length, precision, height, width
      for (std::size_t k = 5; k < 9; ++k) bytes[i + k] = k % 2 == 1 ? 0x7D : 0x00;  // 32000 x 32000
  put(folder.path("a"), bytes);
  EXPECT_NE(complaint(folder.path("a")).find("32000x32000"), std::string::npos);
}

}  // namespace
}  // namespace sparvar
