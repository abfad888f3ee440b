// WebP through libwebp: the pixels; through libwebpmux: the chunks beside them.
#include <fmt/format.h>
#include <webp/decode.h>
#include <webp/encode.h>
#include <webp/mux.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "image/codecs.h"
#include "image/metadata_text.h"
#include "image/orientation.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

struct MuxDeleter {
  void operator()(WebPMux* mux) const { WebPMuxDelete(mux); }
};
using Mux = std::unique_ptr<WebPMux, MuxDeleter>;

struct Encoded {
  Encoded() { WebPMemoryWriterInit(&writer); }
  Encoded(const Encoded&) = delete;
  Encoded& operator=(const Encoded&) = delete;
  ~Encoded() {
    WebPMemoryWriterClear(&writer);
    WebPPictureFree(&picture);
  }
  WebPMemoryWriter writer{};
  WebPPicture picture{};
};

[[noreturn]] void fail_writing(const std::string& path, const char* why) {
  throw Error(ErrorKind::system, fmt::format("cannot write {}: {}", path, why));
}

void encode(const std::string& path, const Image& image, int quality, Encoded& out) {
  WebPConfig config;
  if (WebPConfigInit(&config) == 0 || WebPPictureInit(&out.picture) == 0)
    fail_writing(path, "libwebp is of another version than the one this program was built with");
  config.quality = static_cast<float>(quality);
  if (quality == 100) {
    config.lossless = 1;
    config.quality = 75;  // of a lossless picture: the effort
  }
  out.picture.use_argb = config.lossless;
  out.picture.width = image.width;
  out.picture.height = image.height;
  out.picture.writer = WebPMemoryWrite;
  out.picture.custom_ptr = &out.writer;
  if (WebPPictureImportRGB(&out.picture, image.rgb.data(), image.width * 3) == 0 ||
      WebPEncode(&config, &out.picture) == 0)
    fail_writing(path, out.picture.error_code == VP8_ENC_ERROR_OUT_OF_MEMORY ? "out of memory" : "libwebp failed");
}

/// The file with an XMP chunk beside its pixels.
Bytes with_xmp(const std::string& path, const Encoded& encoded, const std::string& xmp) {
  const Mux mux(WebPMuxNew());
  const WebPData pixels{encoded.writer.mem, encoded.writer.size};
  const WebPData text{reinterpret_cast<const std::uint8_t*>(xmp.data()), xmp.size()};
  WebPData file{};
  if (!mux || WebPMuxSetImage(mux.get(), &pixels, 0) != WEBP_MUX_OK ||
      WebPMuxSetChunk(mux.get(), "XMP ", &text, 0) != WEBP_MUX_OK || WebPMuxAssemble(mux.get(), &file) != WEBP_MUX_OK)
    fail_writing(path, "libwebpmux failed");
  const std::unique_ptr<WebPData, void (*)(WebPData*)> owner(&file, WebPDataClear);
  return {file.bytes, file.bytes + file.size};
}

/// A chunk of the file by its four letters; empty where there is none or the file is damaged.
Bytes chunk(ByteView file, const char* name) {
  const WebPData data{file.data(), file.size()};
  const Mux mux(WebPMuxCreate(&data, 0));
  WebPData found{};
  if (!mux || WebPMuxGetChunk(mux.get(), name, &found) != WEBP_MUX_OK) return {};
  return {found.bytes, found.bytes + found.size};
}

WebPBitstreamFeatures features_of(const std::string& path, ByteView file) {
  WebPBitstreamFeatures features;
  const VP8StatusCode status = WebPGetFeatures(file.data(), file.size(), &features);
  if (status == VP8_STATUS_NOT_ENOUGH_DATA) fail_reading(path, "the file ends too early");
  if (status != VP8_STATUS_OK) fail_reading(path, "not a WebP picture that libwebp knows");
  if (features.has_animation != 0) fail_reading(path, "it is an animation; save one frame of it as a picture");
  check_size(path, static_cast<std::uint64_t>(features.width), static_cast<std::uint64_t>(features.height));
  return features;
}

}  // namespace

Bytes encode_webp(const std::string& path, const Image& image, const ImageMetadata& metadata, int quality) {
  if (std::max(image.width, image.height) > WEBP_MAX_DIMENSION)
    throw Error(ErrorKind::usage, fmt::format("{}: {}x{} pixels, a WebP picture has at most {} a side", path,
                                              image.width, image.height, WEBP_MAX_DIMENSION));
  Encoded encoded;
  encode(path, image, quality, encoded);
  if (metadata.empty()) return {encoded.writer.mem, encoded.writer.mem + encoded.writer.size};
  return with_xmp(path, encoded, to_xmp(metadata));
}

Image decode_webp(const std::string& path, ByteView file) {
  const WebPBitstreamFeatures features = features_of(path, file);
  const int stride = features.width * 4;
  Bytes rgba(static_cast<std::size_t>(stride) * static_cast<std::size_t>(features.height));
  if (WebPDecodeRGBAInto(file.data(), file.size(), rgba.data(), rgba.size(), stride) == nullptr)
    fail_reading(path, "the file is cut short or damaged");
  return oriented(lay_on_white(rgba, features.width, features.height), exif_orientation(chunk(file, "EXIF")));
}

ImageMetadata webp_metadata(const std::string& path, ByteView file) {
  features_of(path, file);
  const Bytes xmp = chunk(file, "XMP ");
  return from_xmp({reinterpret_cast<const char*>(xmp.data()), xmp.size()});
}

}  // namespace sparvar
