#include "visual/reconstruct.h"

#include <fmt/format.h>

#include "core/clock.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

double lap(Clock::time_point& start) {
  const double seconds = seconds_since(start);
  start = Clock::now();
  return seconds;
}

/// The codes of `bits`, resized and summed in the order in which they were made.
Tensor sum_of_codes(const Quantized& quantized, const ScaleSchedule& grids, std::size_t scales) {
  Tensor sum = Tensor::zeros(DType::f32, quantized.sum.shape());
  for (std::size_t k = 0; k < scales; ++k) {
    const Tensor bits = quantized.bits[k].reshaped({1, grids[k].tokens(), sum.dim(1)});
    const Tensor codes = resize_bilinear(bits_to_codes(bits, grids[k], false), grids.back());
    for (std::int64_t i = 0; i < sum.size(); ++i) sum.data<float>()[i] += codes.data<float>()[i];
  }
  return sum;
}

}  // namespace

ScaleSchedule vae_grids(const ScaleSchedule& tokens, bool patchify) {
  ScaleSchedule grids = tokens;
  if (patchify)
    for (Grid& grid : grids) grid = {2 * grid.h, 2 * grid.w};
  return grids;
}

Reconstruction reconstruct(BsqVae& vae, Backend& backend, const Image& picture, const ScaleSchedule& grids,
                           int skip_scales) {
  const int scales = static_cast<int>(grids.size());
  if (skip_scales < 0 || skip_scales >= scales)
    throw Error(ErrorKind::usage, fmt::format("{} scales to leave out: this model has {}, one at least has to stay",
                                              skip_scales, scales));
  Reconstruction out;
  Clock::time_point start = Clock::now();
  const Tensor features = vae.encode(from_image(picture));
  if (features.dim(2) != grids.back().h || features.dim(3) != grids.back().w)
    throw Error(ErrorKind::usage,
                fmt::format("a picture of {}x{} pixels has {}x{} codes, but the last scale has {}x{}", picture.width,
                            picture.height, features.dim(2), features.dim(3), grids.back().h, grids.back().w));
  out.encode_seconds = lap(start);
  out.quantized = quantize(features, grids);
  out.quantize_seconds = lap(start);
  const Tensor codes = sum_of_codes(out.quantized, grids, static_cast<std::size_t>(scales - skip_scales));
  out.picture = to_image(backend.download(vae.draw(backend.upload(codes))), 0);
  out.decode_seconds = lap(start);
  return out;
}

}  // namespace sparvar
