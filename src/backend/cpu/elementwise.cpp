// Activations, modulation, guidance, bits.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "bits/codes.h"
#include "bits/sampling.h"
#include "sparvar/error.h"

namespace sparvar {

Tensor CpuBackend::apply(const Tensor& x, Activation activation) {
  Tensor out = Tensor::empty(DType::f32, x.shape());
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const float v = x.data<float>()[i];
    if (activation == Activation::silu)
      out.data<float>()[i] = v / (1.0F + std::exp(-v));
    else if (activation == Activation::gelu_tanh)
      out.data<float>()[i] = 0.5F * v * (1.0F + std::tanh(0.7978845608028654F * (v + 0.044715F * v * v * v)));
    else
      out.data<float>()[i] = v;
  }
  return out;
}

void CpuBackend::add_repeated(Tensor& x, const Tensor& y) {
  const std::int64_t period = y.size();
  if (period == 0 || x.size() % period != 0)
    throw Error(ErrorKind::usage,
                fmt::format("{} cannot be added again and again to {}", to_string(y.shape()), to_string(x.shape())));
  for (float* row = x.data<float>(); row != x.data<float>() + x.size(); row += period)
    for (std::int64_t i = 0; i < period; ++i) row[i] += y.data<float>()[i];
}

Tensor CpuBackend::modulation(const Tensor& shared, const Tensor& own, int parts) {
  const std::int64_t rows = shared.dim(0);
  const std::int64_t width = shared.size() / (rows * parts);
  Tensor out = Tensor::empty(DType::f32, {parts, rows, width});
  for (std::int64_t p = 0; p < parts; ++p)
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < width; ++i)
        out.data<float>()[(p * rows + r) * width + i] = shared.data<float>()[(r * parts + p) * width + i] +
                                                        (own.defined() ? own.data<float>()[p * width + i] : 0.0F);
  return out;
}

void CpuBackend::guide_hidden(Tensor& x, const Tensor& guidance) {
  const float cfg = guidance.data<float>()[0];
  if (cfg == 1.0F) return;  // as upstream: the halves stay apart
  const std::int64_t half = x.size() / 2;
  float* conditional = x.data<float>();
  float* unconditional = conditional + half;
  for (std::int64_t i = 0; i < half; ++i)
    conditional[i] = unconditional[i] = cfg * conditional[i] + (1.0F - cfg) * unconditional[i];
}

Tensor CpuBackend::guide_logits(const Tensor& logits, std::int64_t pictures, const Tensor& guidance) {
  const float cfg = guidance.data<float>()[0];
  const float inverse_tau = guidance.data<float>()[1];
  const bool guided = logits.dim(0) > pictures;
  Tensor out = Tensor::empty(DType::f32, {pictures, logits.dim(1), logits.dim(2)});
  const float* conditional = logits.data<float>();
  const float* unconditional = conditional + out.size();
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const float value = conditional[i] * inverse_tau;
    out.data<float>()[i] = guided ? cfg * value + (1.0F - cfg) * (unconditional[i] * inverse_tau) : value;
  }
  return out;
}

Tensor CpuBackend::sample_bits(const Tensor& logits, const Tensor& sampling, int scale) {
  return sparvar::sample_bits(logits, SamplingWords::from(sampling), scale);
}

void CpuBackend::add_codes(Tensor& summed, const Tensor& bits, Grid tokens, bool patchify) {
  const Grid full{static_cast<int>(summed.dim(2)), static_cast<int>(summed.dim(3))};
  const Tensor codes = resize_bilinear(bits_to_codes(bits, tokens, patchify), full);
  for (std::int64_t i = 0; i < summed.size(); ++i) summed.data<float>()[i] += codes.data<float>()[i];
}

Tensor CpuBackend::codes_to_words(const Tensor& summed, Grid tokens, bool patchify) {
  return sparvar::codes_to_words(summed, tokens, patchify);
}

}  // namespace sparvar
