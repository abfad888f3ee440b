// The three file formats, from memory to memory. Errors name `path`, which is opened by the caller.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sparvar/image.h"

namespace sparvar {

using Bytes = std::vector<std::uint8_t>;
using ByteView = std::span<const std::uint8_t>;

constexpr int kLargestSide = 32768;
constexpr std::uint64_t kMostPixels = std::uint64_t{1} << 27;

/// Throws Error(input): "cannot read PATH: WHY".
[[noreturn]] void fail_reading(const std::string& path, std::string_view why);
/// Throws Error(input) for a picture larger than those that are read.
void check_size(const std::string& path, std::uint64_t width, std::uint64_t height);

/// RGBA on white.
Image lay_on_white(const Bytes& rgba, int width, int height);

Bytes encode_png(const std::string& path, const Image& image, const ImageMetadata& metadata);
Image decode_png(const std::string& path, ByteView file);
ImageMetadata png_metadata(const std::string& path, ByteView file);

Bytes encode_jpeg(const std::string& path, const Image& image, const ImageMetadata& metadata, int quality);
Image decode_jpeg(const std::string& path, ByteView file);
ImageMetadata jpeg_metadata(const std::string& path, ByteView file);

Bytes encode_webp(const std::string& path, const Image& image, const ImageMetadata& metadata, int quality);
Image decode_webp(const std::string& path, ByteView file);
ImageMetadata webp_metadata(const std::string& path, ByteView file);

}  // namespace sparvar
