// Picture files of every format: which one it is, and what they have in common.
#include "sparvar/image.h"

#include <fmt/format.h>

#include <array>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <optional>

#include "core/open_file.h"
#include "image/atomic_file.h"
#include "image/codecs.h"
#include "image/metadata_text.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::uint64_t kLargestFile = std::uint64_t{1} << 30;

Bytes read_file(const std::string& path) {
  const OpenFile file(path);
  if (file.size() > kLargestFile)
    fail_reading(path, fmt::format("{} bytes, pictures of at most {} are read", file.size(), kLargestFile));
  return file.read<Bytes>();
}

bool begins_with(ByteView file, std::string_view signature, std::size_t at = 0) {
  return file.size() >= at + signature.size() && std::memcmp(file.data() + at, signature.data(), signature.size()) == 0;
}

std::optional<ImageFormat> sniff(ByteView file) {
  if (begins_with(file, "\x89PNG\r\n\x1a\n")) return ImageFormat::png;
  if (begins_with(file, "\xFF\xD8\xFF")) return ImageFormat::jpeg;
  if (begins_with(file, "RIFF") && begins_with(file, "WEBP", 8)) return ImageFormat::webp;
  return std::nullopt;
}

/// The first bytes of a file that is no picture, so that its owner sees what it is.
std::string beginning(ByteView file) {
  std::string text;
  for (const std::uint8_t byte : file.first(std::min<std::size_t>(file.size(), 16)))
    text += byte >= 0x20 && byte <= 0x7e ? static_cast<char>(byte) : '?';
  return text;
}

ImageFormat format_in(const std::string& path, ByteView file) {
  if (file.empty()) fail_reading(path, "it is empty");
  const std::optional<ImageFormat> format = sniff(file);
  if (!format)
    fail_reading(
        path, fmt::format("expected a PNG, JPEG or WebP picture, found a file that begins with '{}'", beginning(file)));
  return *format;
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

void fail_reading(const std::string& path, std::string_view why) {
  throw Error(ErrorKind::input, fmt::format("cannot read {}: {}", path, why));
}

void check_size(const std::string& path, std::uint64_t width, std::uint64_t height) {
  if (width == 0 || height == 0) fail_reading(path, fmt::format("{}x{} pixels", width, height));
  if (width > kLargestSide || height > kLargestSide || width * height > kMostPixels)
    fail_reading(path, fmt::format("{}x{} pixels, at most {} a side and {} in all are read", width, height,
                                   kLargestSide, kMostPixels));
}

Image lay_on_white(const Bytes& rgba, int width, int height) {
  Image image{width, height, {}};
  const std::size_t pixels = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
  image.rgb.resize(pixels * 3);
  for (std::size_t i = 0; i < pixels; ++i) {
    const unsigned alpha = rgba[4 * i + 3];
    for (std::size_t c = 0; c < 3; ++c)
      image.rgb[3 * i + c] = static_cast<std::uint8_t>((rgba[4 * i + c] * alpha + 255 * (255 - alpha) + 127) / 255);
  }
  return image;
}

const char* name_of(ImageFormat format) {
  constexpr const char* names[] = {"png", "jpeg", "webp"};
  return names[static_cast<int>(format)];
}

ImageFormat format_of(const std::string& path) {
  std::string extension = std::filesystem::path(path).extension().string();
  for (char& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (extension == ".png") return ImageFormat::png;
  if (extension == ".jpg" || extension == ".jpeg") return ImageFormat::jpeg;
  if (extension == ".webp") return ImageFormat::webp;
  throw Error(ErrorKind::usage, fmt::format("{}: a picture's name ends with .png, .jpg, .jpeg or .webp", path));
}

void write_image(const std::string& path, const Image& image, ImageFormat format, const ImageMetadata& metadata,
                 int quality) {
  check_pixels(image);
  check_keywords(metadata);
  if (quality < 1 || quality > 100)
    throw Error(ErrorKind::usage, fmt::format("quality: expected 1 to 100, found {}", quality));
  switch (format) {
    case ImageFormat::png:
      return write_file_atomically(path, encode_png(path, image, metadata));
    case ImageFormat::jpeg:
      return write_file_atomically(path, encode_jpeg(path, image, metadata, quality));
    case ImageFormat::webp:
      return write_file_atomically(path, encode_webp(path, image, metadata, quality));
  }
}

void write_png(const std::string& path, const Image& image, const ImageMetadata& metadata) {
  write_image(path, image, ImageFormat::png, metadata);
}

Image read_image(const std::string& path) {
  const Bytes file = read_file(path);
  switch (format_in(path, file)) {
    case ImageFormat::png:
      return decode_png(path, file);
    case ImageFormat::jpeg:
      return decode_jpeg(path, file);
    case ImageFormat::webp:
      break;
  }
  return decode_webp(path, file);
}

Image read_png(const std::string& path) {
  const Bytes file = read_file(path);
  if (sniff(file) != ImageFormat::png) fail_reading(path, "it is not a PNG file");
  return decode_png(path, file);
}

ImageMetadata read_image_metadata(const std::string& path) {
  const Bytes file = read_file(path);
  switch (format_in(path, file)) {
    case ImageFormat::png:
      return png_metadata(path, file);
    case ImageFormat::jpeg:
      return jpeg_metadata(path, file);
    case ImageFormat::webp:
      break;
  }
  return webp_metadata(path, file);
}

}  // namespace sparvar
