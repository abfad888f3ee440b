// 8-bit RGB pictures.
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

/// Text chunks of a PNG: keyword, value.
using ImageMetadata = std::vector<std::pair<std::string, std::string>>;

/// Written aside, then renamed: `path` holds the whole picture or what it held before. Throws Error(system).
void write_png(const std::string& path, const Image& image, const ImageMetadata& metadata = {});
/// 8-bit gray, palette, RGB(A) and 16-bit PNG; alpha is laid on white. Throws Error(input).
Image read_png(const std::string& path);

/// Peak signal-to-noise ratio in dB over all channels; infinity for equal pictures. Throws Error(usage) where sizes
/// differ.
double psnr(const Image& a, const Image& b);
/// Mean structural similarity, 11x11 Gaussian window (sigma 1.5), per channel, averaged.
double ssim(const Image& a, const Image& b);

}  // namespace sparvar
