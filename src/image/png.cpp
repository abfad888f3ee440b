// PNG through libpng. libpng reports errors by longjmp: the functions between setjmp and longjmp hold no C++ objects,
// everything with a destructor lives in their caller.
#include <fmt/format.h>
#include <png.h>

#include <array>
#include <cerrno>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>

#include "image/atomic_file.h"
#include "sparvar/error.h"
#include "sparvar/image.h"

namespace sparvar {
namespace {

constexpr png_uint_32 kLargestSide = 32768;
constexpr std::uint64_t kMostPixels = std::uint64_t{1} << 27;
constexpr png_alloc_size_t kLargestBlock = 64 << 20;
constexpr int kCompressionLevel = 4;  // of zlib: 6 takes twice as long for a few per cent

/// What libpng said last, kept outside the frames that longjmp leaves.
struct Failure {
  std::array<char, 200> text{};
};

[[noreturn]] void on_error(png_structp png, png_const_charp message) {
  auto* failure = static_cast<Failure*>(png_get_error_ptr(png));
  std::snprintf(failure->text.data(), failure->text.size(), "%s", message);
  png_longjmp(png, 1);
}

void on_warning(png_structp, png_const_charp) {}

/// libpng takes a text chunk's word for its length, up to 2 GB, whatever png_set_chunk_malloc_max says.
png_voidp allocate(png_structp, png_alloc_size_t bytes) {
  return bytes <= kLargestBlock ? std::malloc(bytes) : nullptr;
}
void release(png_structp, png_voidp block) { std::free(block); }

// ---- writing

struct Writer {
  Writer() = default;
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  ~Writer() { png_destroy_write_struct(&png, &info); }

  png_structp png = nullptr;
  png_infop info = nullptr;
  Failure failure;
  std::vector<std::uint8_t> bytes;
};

void append(png_structp png, png_bytep data, png_size_t length) {
  auto* bytes = static_cast<std::vector<std::uint8_t>*>(png_get_io_ptr(png));
  bool failed = false;
  try {
    bytes->insert(bytes->end(), data, data + length);
  } catch (const std::exception&) {
    failed = true;  // leave the handler before longjmp
  }
  if (failed) png_error(png, "out of memory");
}

void flush_nothing(png_structp) {}

/// False where libpng failed.
bool encode(Writer& writer, const Image& image, png_textp texts, int text_count) {
  if (setjmp(png_jmpbuf(writer.png)) != 0) return false;
  png_set_write_fn(writer.png, &writer.bytes, append, flush_nothing);
  png_set_compression_level(writer.png, kCompressionLevel);
  png_set_filter(writer.png, PNG_FILTER_TYPE_BASE, PNG_FILTER_SUB | PNG_FILTER_UP | PNG_FILTER_PAETH);
  png_set_IHDR(writer.png, writer.info, static_cast<png_uint_32>(image.width), static_cast<png_uint_32>(image.height),
               8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  if (text_count > 0) png_set_text(writer.png, writer.info, texts, text_count);
  png_write_info(writer.png, writer.info);
  const std::size_t row = static_cast<std::size_t>(image.width) * 3;
  for (int y = 0; y < image.height; ++y)
    png_write_row(writer.png, image.rgb.data() + static_cast<std::size_t>(y) * row);
  png_write_end(writer.png, writer.info);
  return true;
}

/// iTXt, the one text chunk that holds UTF-8. The result points into `metadata`.
std::vector<png_text> text_chunks(const ImageMetadata& metadata) {
  std::vector<png_text> texts;
  for (const auto& [keyword, value] : metadata) {
    bool printable = !keyword.empty() && keyword.size() <= 79 && keyword.front() != ' ' && keyword.back() != ' ';
    for (const char c : keyword) printable = printable && c >= ' ' && c <= '~';
    if (!printable)
      throw Error(ErrorKind::usage,
                  fmt::format("'{}' cannot be the keyword of a PNG text: 1 to 79 ASCII letters", keyword));
    png_text text{};
    text.compression = PNG_ITXT_COMPRESSION_NONE;
    text.key = const_cast<png_charp>(keyword.c_str());  // NOLINT: libpng only reads it
    text.text = const_cast<png_charp>(value.c_str());   // NOLINT
    text.itxt_length = value.size();
    texts.push_back(text);
  }
  return texts;
}

// ---- reading

struct Reader {
  Reader() = default;
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }

  png_structp png = nullptr;
  png_infop info = nullptr;
  Failure failure;
  png_uint_32 width = 0;
  png_uint_32 height = 0;
};

/// Reads the header and asks for 8-bit RGBA rows whatever the file holds.
bool read_header(Reader& reader, std::FILE* file) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
  png_init_io(reader.png, file);
  png_set_user_limits(reader.png, kLargestSide, kLargestSide);
  png_set_chunk_malloc_max(reader.png, kLargestBlock);
  png_read_info(reader.png, reader.info);
  reader.width = png_get_image_width(reader.png, reader.info);
  reader.height = png_get_image_height(reader.png, reader.info);
  png_set_expand(reader.png);  // palette and small gray to 8 bits, transparent colours to alpha
  png_set_scale_16(reader.png);
  png_set_gray_to_rgb(reader.png);
  png_set_add_alpha(reader.png, 0xff, PNG_FILLER_AFTER);
  png_set_interlace_handling(reader.png);
  png_read_update_info(reader.png, reader.info);
  return true;
}

bool read_rows(Reader& reader, png_bytepp rows) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
  png_read_image(reader.png, rows);
  png_read_end(reader.png, nullptr);
  return true;
}

Image lay_on_white(const std::vector<std::uint8_t>& rgba, png_uint_32 width, png_uint_32 height) {
  Image image{static_cast<int>(width), static_cast<int>(height), {}};
  const std::size_t pixels = static_cast<std::size_t>(width) * height;
  image.rgb.resize(pixels * 3);
  for (std::size_t i = 0; i < pixels; ++i) {
    const unsigned alpha = rgba[4 * i + 3];
    for (std::size_t c = 0; c < 3; ++c)
      image.rgb[3 * i + c] = static_cast<std::uint8_t>((rgba[4 * i + c] * alpha + 255 * (255 - alpha) + 127) / 255);
  }
  return image;
}

[[noreturn]] void fail_reading(const std::string& path, const std::string& why) {
  throw Error(ErrorKind::input, fmt::format("cannot read {}: {}", path, why));
}

void check_pixels(const Image& image) {
  const bool fits =
      image.width > 0 && image.height > 0 &&
      image.rgb.size() == static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height) * 3;
  if (!fits)
    throw Error(ErrorKind::usage, fmt::format("a picture of {}x{} pixels cannot hold {} bytes", image.width,
                                              image.height, image.rgb.size()));
}

}  // namespace

void write_png(const std::string& path, const Image& image, const ImageMetadata& metadata) {
  check_pixels(image);
  std::vector<png_text> texts = text_chunks(metadata);
  Writer writer;
  writer.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &writer.failure, on_error, on_warning);
  if (writer.png != nullptr) writer.info = png_create_info_struct(writer.png);
  if (writer.info == nullptr)
    throw Error(ErrorKind::system, fmt::format("cannot write {}: libpng does not start", path));
  if (!encode(writer, image, texts.data(), static_cast<int>(texts.size())))
    throw Error(ErrorKind::system, fmt::format("cannot write {}: {}", path, writer.failure.text.data()));
  write_file_atomically(path, writer.bytes);
}

Image read_png(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), std::fclose);
  if (!file) fail_reading(path, std::generic_category().message(errno));
  std::array<png_byte, 8> signature{};
  errno = 0;
  const std::size_t got = std::fread(signature.data(), 1, signature.size(), file.get());
  if (std::ferror(file.get()) != 0) fail_reading(path, std::generic_category().message(errno));
  if (got != signature.size() || png_sig_cmp(signature.data(), 0, signature.size()) != 0)
    fail_reading(path, "it is not a PNG file");

  Reader reader;
  reader.png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, &reader.failure, on_error, on_warning, nullptr, allocate,
                                        release);
  if (reader.png != nullptr) reader.info = png_create_info_struct(reader.png);
  if (reader.info == nullptr)
    throw Error(ErrorKind::system, fmt::format("cannot read {}: libpng does not start", path));
  png_set_sig_bytes(reader.png, static_cast<int>(signature.size()));
  if (!read_header(reader, file.get())) fail_reading(path, reader.failure.text.data());
  const std::uint64_t pixels = static_cast<std::uint64_t>(reader.width) * reader.height;
  if (pixels > kMostPixels)
    fail_reading(path, fmt::format("{}x{} pixels, at most {} are read", reader.width, reader.height, kMostPixels));

  std::vector<std::uint8_t> rgba(static_cast<std::size_t>(pixels) * 4);
  std::vector<png_bytep> rows(reader.height);
  for (std::size_t y = 0; y < rows.size(); ++y) rows[y] = rgba.data() + y * reader.width * 4;
  if (!read_rows(reader, rows.data())) fail_reading(path, reader.failure.text.data());
  return lay_on_white(rgba, reader.width, reader.height);
}

}  // namespace sparvar
