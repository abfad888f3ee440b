#include "weights/int8.h"

#include <algorithm>

#include "core/parallel.h"

namespace sparvar {

Tensor widened(const Tensor& w, const Tensor& scale) {
  Tensor out = Tensor::empty(DType::f32, w.shape());
  const std::int64_t channels = w.dim(0);
  if (out.size() == 0) return out;
  const std::int64_t each = w.size() / channels;
  parallel_ranges(channels, std::max<std::int64_t>(1, (1 << 14) / each), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t o = begin; o < end; ++o) {
      const float factor = scale.data<float>()[o];
      const std::int8_t* from = w.data<std::int8_t>() + o * each;
      float* to = out.data<float>() + o * each;
      for (std::int64_t i = 0; i < each; ++i) to[i] = factor * static_cast<float>(from[i]);
    }
  });
  return out;
}

}  // namespace sparvar
