// LayerNorm, RMSNorm, gates: one row at a time, rows in parallel.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/row_kernels.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using rows::get;
using rows::kParts;
using rows::put;

SPARVAR_CLONES float sum_of(const float* x, std::int64_t n) {
  float parts[kParts] = {};
  std::int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) parts[p] += x[i + p];
  for (; i < n; ++i) parts[0] += x[i];
  return rows::total(parts);
}

SPARVAR_CLONES float squares_around(const float* x, std::int64_t n, float centre) {
  float parts[kParts] = {};
  std::int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) parts[p] += (x[i + p] - centre) * (x[i + p] - centre);
  for (; i < n; ++i) parts[0] += (x[i] - centre) * (x[i] - centre);
  return rows::total(parts);
}

/// out = (x - mean) * inverse * (offset + scale) + shift; scale and shift may be null.
SPARVAR_CLONES void normalise_f32(const float* x, std::int64_t n, float mean, float inverse, const float* scale,
                                  float offset, const float* shift, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * inverse * (scale != nullptr ? offset + scale[i] : 1.0F);
    put(out, i, shift != nullptr ? y + shift[i] : y);
  }
}

SPARVAR_CLONES void normalise_bf16(const float* x, std::int64_t n, float mean, float inverse, const float* scale,
                                   float offset, const float* shift, BFloat16* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * inverse * (scale != nullptr ? offset + scale[i] : 1.0F);
    put(out, i, shift != nullptr ? y + shift[i] : y);
  }
}

SPARVAR_CLONES void add_f32(float* x, const float* y, const float* gate, std::int64_t n) {
  if (gate == nullptr)
    for (std::int64_t i = 0; i < n; ++i) x[i] += y[i];
  else
    for (std::int64_t i = 0; i < n; ++i) x[i] += gate[i] * y[i];
}

SPARVAR_CLONES void add_bf16(float* x, const BFloat16* y, const float* gate, std::int64_t n) {
  if (gate == nullptr)
    for (std::int64_t i = 0; i < n; ++i) x[i] += get(y, i);
  else
    for (std::int64_t i = 0; i < n; ++i) x[i] += gate[i] * get(y, i);
}

struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
};

/// Every row of x [rows, C] normalised into a tensor of type `type`; affine(row) gives its scale and shift.
template <typename AffineOf>
Tensor normalise(const Tensor& x, DType type, float eps, bool centred, float offset, AffineOf affine) {
  const std::int64_t width = x.dim(-1);
  Tensor out = Tensor::empty(type, x.shape());
  parallel_ranges(width == 0 ? 0 : x.size() / width, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* row = x.data<float>() + r * width;
      const float mean = centred ? sum_of(row, width) / static_cast<float>(width) : 0.0F;
      const float inverse = 1.0F / std::sqrt(squares_around(row, width, mean) / static_cast<float>(width) + eps);
      const Affine a = affine(r);
      if (type == DType::f32)
        normalise_f32(row, width, mean, inverse, a.scale, offset, a.shift, out.data<float>() + r * width);
      else
        normalise_bf16(row, width, mean, inverse, a.scale, offset, a.shift, out.data<BFloat16>() + r * width);
    }
  });
  return out;
}

const float* data_of(const Tensor& x) { return x.defined() ? x.data<float>() : nullptr; }

/// Rows of x that share a row of `parts` [G, C]; all of them where it is undefined.
std::int64_t rows_per_part(const char* what, const Tensor& x, const Tensor& parts) {
  const std::int64_t rows = x.dim(-1) == 0 ? 0 : x.size() / x.dim(-1);
  if (!parts.defined()) return std::max<std::int64_t>(rows, 1);
  const std::int64_t count = parts.size() / std::max<std::int64_t>(parts.dim(-1), 1);
  if (parts.dim(-1) != x.dim(-1) || count == 0 || rows % count != 0)
    throw Error(ErrorKind::usage,
                fmt::format("{}: {} does not fit {}", what, to_string(parts.shape()), to_string(x.shape())));
  return std::max<std::int64_t>(rows / count, 1);
}

}  // namespace

void CpuBackend::add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) {
  const std::int64_t period = rows_per_part("gate", residual, gate);
  if (y.size() != residual.size())
    throw Error(ErrorKind::usage,
                fmt::format("residual {} and {} differ in size", to_string(residual.shape()), to_string(y.shape())));
  const std::int64_t width = residual.dim(-1);
  parallel_ranges(residual.size() / width, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const float* g = gate.defined() ? gate.data<float>() + r / period * width : nullptr;
      if (y.dtype() == DType::f32)
        add_f32(residual.data<float>() + r * width, y.data<float>() + r * width, g, width);
      else
        add_bf16(residual.data<float>() + r * width, y.data<BFloat16>() + r * width, g, width);
    }
  });
}

Tensor CpuBackend::layer_norm(const Tensor& x, const NormArgs& args) {
  const std::int64_t scale_period = rows_per_part("norm scale", x, args.scale);
  const std::int64_t shift_period = rows_per_part("norm shift", x, args.shift);
  const std::int64_t width = x.dim(-1);
  return normalise(x, args.out, args.eps, true, args.one_plus, [&](std::int64_t r) {
    return Affine{args.scale.defined() ? data_of(args.scale) + r / scale_period * width : nullptr,
                  args.shift.defined() ? data_of(args.shift) + r / shift_period * width : nullptr};
  });
}

Tensor CpuBackend::add_gated_norm(Tensor& residual, const Tensor& y, const Tensor& gate, const NormArgs& args) {
  add_gated(residual, y, gate);
  return layer_norm(residual, args);
}

Tensor CpuBackend::rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) {
  const Affine affine{data_of(weight), nullptr};
  return normalise(x, out, eps, false, 0.0F, [&](std::int64_t) { return affine; });
}

}  // namespace sparvar
