// JPEG through libjpeg-turbo, which reports errors by longjmp as libpng does: functions with a setjmp hold no C++
// objects.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
// jpeglib.h uses FILE and size_t without including what declares them.
#include <jerror.h>
#include <jpeglib.h>

#include "image/codecs.h"
#include "image/metadata_text.h"
#include "image/orientation.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::size_t kLongestSegment = 65533;  // of a marker's data
constexpr int kMostScans = 500;                 // a progressive file of some kilobytes may hold millions
constexpr int kExifMarker = JPEG_APP0 + 1;

/// libjpeg's error manager, and where to go from it. `base` comes first: libjpeg knows only that.
struct Failure {
  jpeg_error_mgr base{};
  std::jmp_buf away{};
  std::array<char, JMSG_LENGTH_MAX> text{};
};

[[noreturn]] void on_error(j_common_ptr codec) {
  auto* failure = reinterpret_cast<Failure*>(codec->err);
  codec->err->format_message(codec, failure->text.data());
  std::longjmp(failure->away, 1);
}

/// A file that libjpeg patches up (cut short, wrong codes) is a broken file. Bytes between segments are harmless.
void on_message(j_common_ptr codec, int level) {
  if (level < 0 && codec->err->msg_code != JWRN_EXTRANEOUS_DATA) on_error(codec);
}

void start(Failure& failure) {
  jpeg_std_error(&failure.base);
  failure.base.error_exit = on_error;
  failure.base.emit_message = on_message;
}

// ---- reading

struct Reader {
  Reader() {
    start(failure);
    codec.err = &failure.base;
    progress.progress_monitor = stop_at_many_scans;
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { jpeg_destroy_decompress(&codec); }

  static void stop_at_many_scans(j_common_ptr codec) {
    if (reinterpret_cast<j_decompress_ptr>(codec)->input_scan_number <= kMostScans) return;
    auto* failure = reinterpret_cast<Failure*>(codec->err);
    std::snprintf(failure->text.data(), failure->text.size(), "more than %d scans", kMostScans);
    std::longjmp(failure->away, 1);
  }

  jpeg_decompress_struct codec{};
  Failure failure;
  jpeg_progress_mgr progress{};
};

bool read_header(Reader& reader, ByteView file) {
  if (setjmp(reader.failure.away) != 0) return false;
  jpeg_create_decompress(&reader.codec);
  reader.codec.progress = &reader.progress;
  jpeg_mem_src(&reader.codec, file.data(), static_cast<unsigned long>(file.size()));
  jpeg_save_markers(&reader.codec, kExifMarker, 0xFFFF);
  jpeg_save_markers(&reader.codec, JPEG_COM, 0xFFFF);
  jpeg_read_header(&reader.codec, TRUE);
  const bool four = reader.codec.jpeg_color_space == JCS_CMYK || reader.codec.jpeg_color_space == JCS_YCCK;
  reader.codec.out_color_space = four ? JCS_CMYK : JCS_RGB;
  return true;
}

/// Rows of out_color_space, one after the other.
bool read_rows(Reader& reader, std::uint8_t* out) {
  if (setjmp(reader.failure.away) != 0) return false;
  jpeg_start_decompress(&reader.codec);
  const std::size_t row =
      std::size_t{reader.codec.output_width} * static_cast<std::size_t>(reader.codec.output_components);
  while (reader.codec.output_scanline < reader.codec.output_height) {
    JSAMPROW line = out + row * reader.codec.output_scanline;
    jpeg_read_scanlines(&reader.codec, &line, 1);
  }
  jpeg_finish_decompress(&reader.codec);
  return true;
}

/// Adobe writes CMYK upside down: 255 is no ink.
void to_rgb(const Bytes& cmyk, bool inverted, std::vector<std::uint8_t>& rgb) {
  for (std::size_t i = 0; i < rgb.size() / 3; ++i)
    for (std::size_t c = 0; c < 3; ++c) {
      const unsigned light = inverted ? cmyk[4 * i + c] : 255U - cmyk[4 * i + c];
      const unsigned key = inverted ? cmyk[4 * i + 3] : 255U - cmyk[4 * i + 3];
      rgb[3 * i + c] = static_cast<std::uint8_t>((light * key + 127) / 255);
    }
}

int orientation_of(const Reader& reader) {
  for (jpeg_saved_marker_ptr marker = reader.codec.marker_list; marker != nullptr; marker = marker->next)
    if (marker->marker == kExifMarker && marker->data_length > 6 && std::memcmp(marker->data, "Exif\0", 6) == 0)
      return exif_orientation({marker->data, marker->data_length});
  return 1;
}

// ---- writing

struct Writer {
  Writer() {
    start(failure);
    codec.err = &failure.base;
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  ~Writer() {
    jpeg_destroy_compress(&codec);
    std::free(buffer);
  }

  jpeg_compress_struct codec{};
  Failure failure;
  unsigned char* buffer = nullptr;
  unsigned long size = 0;
};

bool encode(Writer& writer, const Image& image, const char* comment, std::size_t length, int quality) {
  if (setjmp(writer.failure.away) != 0) return false;
  jpeg_compress_struct& codec = writer.codec;
  jpeg_create_compress(&codec);
  jpeg_mem_dest(&codec, &writer.buffer, &writer.size);
  codec.image_width = static_cast<JDIMENSION>(image.width);
  codec.image_height = static_cast<JDIMENSION>(image.height);
  codec.input_components = 3;
  codec.in_color_space = JCS_RGB;
  jpeg_set_defaults(&codec);
  jpeg_set_quality(&codec, quality, TRUE);
  if (quality >= 90)  // colour at full resolution where quality was asked for
    for (int c = 0; c < codec.num_components; ++c)
      codec.comp_info[c].h_samp_factor = codec.comp_info[c].v_samp_factor = 1;
  codec.optimize_coding = TRUE;
  jpeg_start_compress(&codec, TRUE);
  for (std::size_t at = 0; at < length; at += kLongestSegment)
    jpeg_write_marker(&codec, JPEG_COM, reinterpret_cast<const JOCTET*>(comment + at),
                      static_cast<unsigned>(std::min(kLongestSegment, length - at)));
  while (codec.next_scanline < codec.image_height) {
    const std::size_t row = std::size_t{codec.next_scanline} * codec.image_width * 3;
    auto* line = const_cast<JSAMPROW>(image.rgb.data() + row);  // NOLINT: libjpeg only reads it
    jpeg_write_scanlines(&codec, &line, 1);
  }
  jpeg_finish_compress(&codec);
  return true;
}

}  // namespace

Bytes encode_jpeg(const std::string& path, const Image& image, const ImageMetadata& metadata, int quality) {
  if (std::max(image.width, image.height) > JPEG_MAX_DIMENSION)
    throw Error(ErrorKind::usage, fmt::format("{}: {}x{} pixels, a JPEG has at most {} a side", path, image.width,
                                              image.height, JPEG_MAX_DIMENSION));
  const std::string comment = metadata.empty() ? "" : to_json_text(metadata);
  Writer writer;
  if (!encode(writer, image, comment.data(), comment.size(), quality))
    throw Error(ErrorKind::system, fmt::format("cannot write {}: {}", path, writer.failure.text.data()));
  return {writer.buffer, writer.buffer + writer.size};
}

Image decode_jpeg(const std::string& path, ByteView file) {
  Reader reader;
  if (!read_header(reader, file)) fail_reading(path, reader.failure.text.data());
  const jpeg_decompress_struct& codec = reader.codec;
  check_size(path, codec.image_width, codec.image_height);
  const int orientation = orientation_of(reader);  // finishing the pixels frees the markers
  Image image{static_cast<int>(codec.image_width), static_cast<int>(codec.image_height), {}};
  const std::size_t pixels = std::size_t{codec.image_width} * codec.image_height;
  image.rgb.resize(pixels * 3);
  const bool four = codec.out_color_space == JCS_CMYK;
  Bytes cmyk(four ? pixels * 4 : 0);
  if (!read_rows(reader, four ? cmyk.data() : image.rgb.data())) fail_reading(path, reader.failure.text.data());
  if (four) to_rgb(cmyk, codec.saw_Adobe_marker != 0, image.rgb);
  return oriented(std::move(image), orientation);
}

ImageMetadata jpeg_metadata(const std::string& path, ByteView file) {
  Reader reader;
  if (!read_header(reader, file)) fail_reading(path, reader.failure.text.data());
  std::string text;
  for (jpeg_saved_marker_ptr marker = reader.codec.marker_list; marker != nullptr; marker = marker->next)
    if (marker->marker == JPEG_COM) text.append(reinterpret_cast<const char*>(marker->data), marker->data_length);
  return from_json_text(text);
}

}  // namespace sparvar
