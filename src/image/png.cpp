// PNG through libpng. libpng reports errors by longjmp: the functions between setjmp and longjmp hold no C++ objects,
// everything with a destructor lives in their caller.
#include <fmt/format.h>
#include <png.h>

#include <array>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "image/codecs.h"
#include "image/orientation.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

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
  Bytes bytes;
};

void append(png_structp png, png_bytep data, png_size_t length) {
  auto* bytes = static_cast<Bytes*>(png_get_io_ptr(png));
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
  Reader(const std::string& path, ByteView file) : rest(file) {
    png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, &failure, on_error, on_warning, nullptr, allocate, release);
    if (png != nullptr) info = png_create_info_struct(png);
    if (info == nullptr) throw Error(ErrorKind::system, fmt::format("cannot read {}: libpng does not start", path));
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }

  png_structp png = nullptr;
  png_infop info = nullptr;
  Failure failure;
  ByteView rest;
  png_uint_32 width = 0;
  png_uint_32 height = 0;
  int orientation = 1;
};

void take(png_structp png, png_bytep out, png_size_t length) {
  auto* rest = static_cast<ByteView*>(png_get_io_ptr(png));
  if (length > rest->size()) png_error(png, "the file ends too early");
  std::memcpy(out, rest->data(), length);
  *rest = rest->subspan(length);
}

bool read_header(Reader& reader) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
  png_set_read_fn(reader.png, &reader.rest, take);
  png_set_user_limits(reader.png, kLargestSide, kLargestSide);
  png_set_chunk_malloc_max(reader.png, kLargestBlock);
  png_read_info(reader.png, reader.info);
  reader.width = png_get_image_width(reader.png, reader.info);
  reader.height = png_get_image_height(reader.png, reader.info);
  png_uint_32 exif_size = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(reader.png, reader.info, &exif_size, &exif) != 0 && exif != nullptr)
    reader.orientation = exif_orientation({exif, exif_size});
  return true;
}

/// 8-bit RGBA rows whatever the file holds.
bool ask_for_rgba(Reader& reader) {
  if (setjmp(png_jmpbuf(reader.png)) != 0) return false;
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

}  // namespace

Bytes encode_png(const std::string& path, const Image& image, const ImageMetadata& metadata) {
  std::vector<png_text> texts = text_chunks(metadata);
  Writer writer;
  writer.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &writer.failure, on_error, on_warning);
  if (writer.png != nullptr) writer.info = png_create_info_struct(writer.png);
  if (writer.info == nullptr)
    throw Error(ErrorKind::system, fmt::format("cannot write {}: libpng does not start", path));
  if (!encode(writer, image, texts.data(), static_cast<int>(texts.size())))
    throw Error(ErrorKind::system, fmt::format("cannot write {}: {}", path, writer.failure.text.data()));
  return std::move(writer.bytes);
}

Image decode_png(const std::string& path, ByteView file) {
  Reader reader(path, file);
  if (!read_header(reader)) fail_reading(path, reader.failure.text.data());
  check_size(path, reader.width, reader.height);
  if (!ask_for_rgba(reader)) fail_reading(path, reader.failure.text.data());
  const std::size_t row = std::size_t{reader.width} * 4;
  Bytes rgba(row * reader.height);
  std::vector<png_bytep> rows(reader.height);
  for (std::size_t y = 0; y < rows.size(); ++y) rows[y] = rgba.data() + y * row;
  if (!read_rows(reader, rows.data())) fail_reading(path, reader.failure.text.data());
  return oriented(lay_on_white(rgba, static_cast<int>(reader.width), static_cast<int>(reader.height)),
                  reader.orientation);
}

ImageMetadata png_metadata(const std::string& path, ByteView file) {
  Reader reader(path, file);
  if (!read_header(reader)) fail_reading(path, reader.failure.text.data());
  png_textp texts = nullptr;
  int count = 0;
  png_get_text(reader.png, reader.info, &texts, &count);
  ImageMetadata metadata;
  for (int i = 0; i < count; ++i) {
    const png_text& text = texts[i];
    const std::size_t length = text.compression > 0 ? text.itxt_length : text.text_length;
    metadata.emplace_back(text.key, text.text == nullptr ? "" : std::string(text.text, length));
  }
  return metadata;
}

}  // namespace sparvar
