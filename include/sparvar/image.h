// 8-bit RGB pictures and the files they are kept in.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sparvar {

struct Image {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> rgb;  // height * width * 3, row-major, R G B
};

/// Texts kept in a picture file: keyword (1 to 79 printable ASCII characters), value (UTF-8).
/// PNG: iTXt chunks. JPEG: one JSON object in COM segments. WebP: the same object in the XMP packet.
using ImageMetadata = std::vector<std::pair<std::string, std::string>>;

enum class ImageFormat { png, jpeg, webp };

const char* name_of(ImageFormat format);  // "png", "jpeg", "webp"
/// By the extension of a file's name, in any case: .png, .jpg, .jpeg, .webp. Throws Error(usage) for any other.
ImageFormat format_of(const std::string& path);

constexpr int kDefaultQuality = 90;

/// Written aside, then renamed: `path` holds the whole picture or what it held before. `quality` 1 to 100 is of JPEG
/// and WebP; 100 is lossless in WebP; PNG always is. Throws Error(system) where the file cannot be written and
/// Error(usage) where the format cannot hold the picture (WebP: sides up to 16383; JPEG: up to 65500) or a keyword.
void write_image(const std::string& path, const Image& image, ImageFormat format, const ImageMetadata& metadata = {},
                 int quality = kDefaultQuality);
void write_png(const std::string& path, const Image& image, const ImageMetadata& metadata = {});

/// A PNG, JPEG or WebP file, recognised by its first bytes whatever its name. Gray, palette, 16-bit and CMYK become
/// 8-bit RGB; alpha is laid on white; an EXIF orientation is applied. Sides up to 32768, 2^27 pixels in all. Throws
/// Error(input) that names the file and what is wrong with it, Error(system) where it cannot be read.
Image read_image(const std::string& path);
/// read_image for PNG files alone.
Image read_png(const std::string& path);
/// The texts of a PNG, JPEG or WebP file, in the order they were written; pixels are not decoded. A JPEG comment that
/// is not ours comes as {"Comment", text}. Throws as read_image does.
ImageMetadata read_image_metadata(const std::string& path);

/// Peak signal-to-noise ratio in dB over all channels; infinity for equal pictures. Throws Error(usage) where sizes
/// differ.
double psnr(const Image& a, const Image& b);
/// Mean structural similarity, 11x11 Gaussian window (sigma 1.5), per channel, averaged.
double ssim(const Image& a, const Image& b);

}  // namespace sparvar
