// Attention over texts: a few keys, so rows are the parallel axis and everything else fits the first cache.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/row_kernels.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using rows::kParts;

SPARVAR_CLONES float dot(const float* a, const float* b, std::int64_t n) {
  float parts[kParts] = {};
  std::int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) parts[p] += a[i + p] * b[i + p];
  for (; i < n; ++i) parts[0] += a[i] * b[i];
  return rows::total(parts);
}

SPARVAR_CLONES void accumulate(float* out, const float* x, float weight, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] += weight * x[i];
}

SPARVAR_CLONES void widen(const BFloat16* x, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = rows::get(x, i);
}

SPARVAR_CLONES void narrow(const float* x, std::int64_t n, BFloat16* out) {
  for (std::int64_t i = 0; i < n; ++i) rows::put(out, i, x[i]);
}

/// logits -> weights that sum to 1.
void softmax(float* x, std::int64_t n) {
  const float largest = *std::max_element(x, x + n);
  float total = 0.0F;
  for (std::int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - largest);
  for (std::int64_t i = 0; i < n; ++i) x[i] /= total;
}

/// One query of one head over `keys` keys; k and v rows are `stride` floats apart.
void attend(const float* q, const float* k, const float* v, std::int64_t keys, std::int64_t stride, std::int64_t dim,
            float scale, const float* bias, float* weights, float* out) {
  std::fill(out, out + dim, 0.0F);
  if (keys == 0) return;
  for (std::int64_t i = 0; i < keys; ++i)
    weights[i] = dot(q, k + i * stride, dim) * scale + (bias != nullptr ? bias[i] : 0.0F);
  softmax(weights, keys);
  for (std::int64_t i = 0; i < keys; ++i) accumulate(out, v + i * stride, weights[i], dim);
}

}  // namespace

Tensor CpuBackend::cross_attention(const Tensor& q, const Tensor& kv, const Tensor& lengths, std::int64_t, float scale,
                                   bool) {
  const std::vector<std::int32_t> cu_lengths(lengths.data<std::int32_t>(),
                                             lengths.data<std::int32_t>() + lengths.size());
  const std::int64_t n = q.dim(1), heads = q.dim(2), dim = q.dim(3);
  const std::int64_t width = heads * dim;
  if (static_cast<std::int64_t>(cu_lengths.size()) != q.dim(0) + 1 || cu_lengths.back() > kv.dim(0) ||
      kv.size() != kv.dim(0) * 2 * width)
    throw Error(ErrorKind::usage, fmt::format("cross attention: queries {} do not fit keys {} of {} texts",
                                              to_string(q.shape()), to_string(kv.shape()), cu_lengths.size() - 1));
  const Tensor states = kv.to(DType::f32);
  Tensor out = Tensor::empty(q.dtype(), q.shape());
  const std::int64_t longest = kv.dim(0);
  parallel_ranges(q.dim(0) * n, 32, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> query(width), result(width), weights(longest + 1);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t b = r / n;
      const float* k = states.data<float>() + cu_lengths[b] * 2 * width;
      if (q.dtype() == DType::f32)
        std::copy_n(q.data<float>() + r * width, width, query.data());
      else
        widen(q.data<BFloat16>() + r * width, width, query.data());
      for (std::int64_t h = 0; h < heads; ++h)
        attend(query.data() + h * dim, k + h * dim, k + width + h * dim, cu_lengths[b + 1] - cu_lengths[b], 2 * width,
               dim, scale, nullptr, weights.data(), result.data() + h * dim);
      if (q.dtype() == DType::f32)
        std::copy_n(result.data(), width, out.data<float>() + r * width);
      else
        narrow(result.data(), width, out.data<BFloat16>() + r * width);
    }
  });
  return out;
}

Tensor CpuBackend::biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                    const Tensor& length) {
  const std::int64_t tokens = q.dim(0), heads = q.dim(1), dim = q.dim(2);
  const std::int64_t keys = std::clamp<std::int64_t>(length.data<std::int32_t>()[0], 0, tokens);
  if (bias.shape() != Shape{heads, tokens, tokens})
    throw Error(ErrorKind::usage, fmt::format("attention bias: expected {}, found {}",
                                              to_string({heads, tokens, tokens}), to_string(bias.shape())));
  Tensor out = Tensor::empty(DType::f32, q.shape());
  parallel_ranges(tokens, 4, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> weights(tokens + 1);
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t h = 0; h < heads; ++h)
        attend(q.data<float>() + (t * heads + h) * dim, k.data<float>() + h * dim, v.data<float>() + h * dim, keys,
               heads * dim, dim, 1.0F, bias.data<float>() + (h * tokens + t) * tokens, weights.data(),
               out.data<float>() + (t * heads + h) * dim);
  });
  return out;
}

Tensor CpuBackend::gated_gelu(const Tensor& a, const Tensor& b) {
  if (a.size() != b.size())
    throw Error(ErrorKind::usage, fmt::format("{} and {} differ in size", to_string(a.shape()), to_string(b.shape())));
  Tensor out = apply(a, Activation::gelu_tanh);
  for (std::int64_t i = 0; i < out.size(); ++i) out.data<float>()[i] *= b.data<float>()[i];
  return out;
}

}  // namespace sparvar
