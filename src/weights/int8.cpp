#include "weights/int8.h"

#include <algorithm>
#include <cmath>

#include "core/e4m3.h"
#include "core/parallel.h"

namespace sparvar {

Tensor widened(const Tensor& w, const Tensor& scale) {
  Tensor out = Tensor::empty(DType::f32, w.shape());
  const std::int64_t channels = w.dim(0);
  if (out.size() == 0) return out;
  const std::int64_t each = w.size() / channels;
  const bool floats = w.dtype() == DType::e4m3;
  parallel_ranges(channels, std::max<std::int64_t>(1, (1 << 14) / each), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t o = begin; o < end; ++o) {
      const float factor = scale.data<float>()[o];
      const std::int8_t* from = w.data<std::int8_t>() + o * each;
      float* to = out.data<float>() + o * each;
      if (floats)
        for (std::int64_t i = 0; i < each; ++i) to[i] = factor * e4m3_to_float(static_cast<std::uint8_t>(from[i]));
      else
        for (std::int64_t i = 0; i < each; ++i) to[i] = factor * static_cast<float>(from[i]);
    }
  });
  return out;
}

Tensor row_scales(const Tensor& w) {
  Tensor scales = Tensor::empty(DType::f32, {w.dim(0)});
  const std::int64_t each = w.dim(0) == 0 ? 0 : w.size() / w.dim(0);
  for (std::int64_t o = 0; o < w.dim(0); ++o) {
    float largest = 1e-12F;
    for (std::int64_t i = 0; i < each; ++i) {
      const float size = std::abs(w.data<float>()[o * each + i]);
      if (!(size <= largest)) largest = size;  // a NaN wins, and stays
      if (std::isnan(largest)) break;
    }
    scales.data<float>()[o] = largest / 127.0F;
  }
  return scales;
}

Tensor narrowed(const Tensor& w, const Tensor& scale) {
  Tensor out = Tensor::empty(DType::i8, w.shape());
  const std::int64_t each = w.dim(0) == 0 ? 0 : w.size() / w.dim(0);
  for (std::int64_t o = 0; o < w.dim(0); ++o)
    for (std::int64_t i = 0; i < each; ++i) {
      const float rounded = std::nearbyint(w.data<float>()[o * each + i] / scale.data<float>()[o]);
      out.data<std::int8_t>()[o * each + i] = static_cast<std::int8_t>(std::clamp(rounded, -127.0F, 127.0F));
    }
  return out;
}

}  // namespace sparvar
