// Linear layers and norms.
#include <fmt/format.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

const float* floats(const Tensor& x) { return x.defined() ? x.data<float>() : nullptr; }

std::int64_t rows_of(const Tensor& x) { return x.dim(-1) == 0 ? 0 : x.size() / x.dim(-1); }

/// Rows of x that share a row of `parts` [G, C]; all of them where it is undefined.
std::int64_t period_of(const char* what, const Tensor& x, const Tensor& parts) {
  const std::int64_t rows = std::max<std::int64_t>(rows_of(x), 1);
  if (!parts.defined()) return rows;
  const std::int64_t count = rows_of(parts);
  if (parts.dim(-1) != x.dim(-1) || count == 0 || rows % count != 0)
    throw Error(ErrorKind::usage,
                fmt::format("{}: {} does not fit {}", what, to_string(parts.shape()), to_string(x.shape())));
  return rows / count;
}

RowNorm row_norm(const Tensor& x, const NormArgs& args, bool recording) {
  const Tensor& parts = args.scale.defined() ? args.scale : args.shift;
  const std::int64_t period = period_of("norm", x, parts);
  if (args.scale.defined() && args.shift.defined() && args.scale.size() != args.shift.size())
    throw Error(ErrorKind::usage, fmt::format("norm: scale {} and shift {} differ in size",
                                              to_string(args.scale.shape()), to_string(args.shift.shape())));
  return {.rows = rows_of(x),
          .width = static_cast<int>(x.dim(-1)),
          .period = period,
          .scale = floats(args.scale),
          .shift = floats(args.shift),
          .scale_offset = args.one_plus,
          .eps = args.eps,
          .centred = true,
          .settled = args.settled && recording};
}

void check_residual(const Tensor& residual, const Tensor& y) {
  if (y.size() != residual.size())
    throw Error(ErrorKind::usage,
                fmt::format("residual {} and {} differ in size", to_string(residual.shape()), to_string(y.shape())));
}

Operand operand(const Tensor& x) { return {x.raw(), x.dtype() == DType::e4m3 ? scales_of(x) : nullptr}; }

}  // namespace

/// Of host or device, as a weight of `type`.
Tensor CudaBackend::loaded(const Tensor& from, DType type) {
  if (from.place() == Place::device && from.dtype() == type) return from;
  Tensor to = weight_memory(type, from.shape());
  if (!computes()) return to;
  if (from.place() == Place::device)
    convert(from.raw(), from.dtype(), to.raw(), type, to.size(), stream_);
  else
    uploader_.copy(from.dtype() == DType::e4m3 ? from.to(type) : from, to);
  return to;
}

Tensor CudaBackend::loaded_e4m3(const Tensor& from) {
  Tensor to = weight_memory(DType::e4m3, from.shape());
  if (!computes()) return to;
  if (from.dtype() == DType::e4m3) {  // kept so in the model folder
    Tensor scales(scales_of(to), DType::f32, {from.dim(0)}, nullptr, Place::device);
    uploader_.copy(from, to);
    uploader_.copy(Tensor(const_cast<float*>(scales_of(from)), DType::f32, {from.dim(0)}, nullptr), scales);  // NOLINT
  } else if (from.place() == Place::device) {
    quantise_rows({.x = from.raw(),
                   .type = from.dtype(),
                   .rows = from.dim(0),
                   .width = static_cast<int>(from.dim(1)),
                   .out = to.raw(),
                   .scales = scales_of(to)},
                  stream_);
  } else {
    uploader_.quantise(from, to.raw(), scales_of(to));
  }
  return to;
}

LinearPtr CudaBackend::prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind) {
  auto linear = std::make_shared<CudaLinear>();
  linear->out = weight.dim(0);
  linear->in = weight.dim(1);
  static_assert(kWidestE4m3 <= QuantiseRows::kWidest);
  DType type = compute_;
  if (kind == LinearKind::precise) type = DType::f32;
  if (kind == LinearKind::narrow && fp8_ && fits_e4m3(linear->out, linear->in)) type = DType::e4m3;
  linear->input = type;
  linear->weight = type == DType::e4m3 ? loaded_e4m3(weight) : loaded(weight, type);
  if (bias.defined()) {
    linear->bias_f32 = loaded(bias, DType::f32);
    if (type != DType::f32) linear->bias_bf16 = loaded(bias, DType::bf16);
  }
  return linear;
}

void CudaBackend::multiply(const GemmShape& product, const Operand& x, const Operand& weight, const Tensor& bias,
                           Tensor& y, const Tensor& like) {
  if (product.rows == 0 || planning_) return;
  if (!computes()) {
    if (product.batch * product.in * product.out <= like.size()) gemms_->prepare(product, operand(like));
    return;
  }
  weights_are_there();
  gemms_->run(product, x, weight, bias.defined() ? bias.raw() : nullptr, y.raw(), workspace(), recording_);
}

Tensor CudaBackend::linear(const Tensor& x, const Linear& weights, Activation activation, DType out) {
  const auto& linear = dynamic_cast<const CudaLinear&>(weights);
  if (x.dim(-1) != linear.in)
    throw Error(ErrorKind::usage,
                fmt::format("linear layer takes {} channels, got {}", linear.in, to_string(x.shape())));
  const DType type = linear.weight.dtype();
  if (x.dtype() == DType::e4m3 && type != DType::e4m3)
    throw Error(ErrorKind::usage, fmt::format("linear layer of {} weights got e4m3 numbers", name_of(type)));
  if (out == DType::e4m3) {
    const bool gelu = activation == Activation::gelu_tanh;
    return quantised(this->linear(x, weights, gelu ? Activation::none : activation, compute_), gelu);
  }
  // f32 products have no bf16 result, and e4m3 ones no f32 result with a bias.
  if (type == DType::f32 && out == DType::bf16) return converted(this->linear(x, weights, activation, DType::f32), out);
  if (type == DType::e4m3 && out == DType::f32)
    return converted(this->linear(x, weights, activation, DType::bf16), out);
  const Tensor source = type == DType::e4m3 ? quantised(x, false) : converted(x, type);
  Shape shape = x.shape();
  shape.back() = linear.out;
  Tensor result = empty(out, shape);
  const Tensor& bias = out == DType::f32 ? linear.bias_f32 : linear.bias_bf16;
  GemmShape product{.rows = rows_of(source),
                    .in = linear.in,
                    .out = linear.out,
                    .type = type,
                    .result = out,
                    .bias = bias.defined(),
                    .gelu = activation == Activation::gelu_tanh};
  if (product.rows == 0 || planning_) return result;
  const bool fused = product.gelu && type != DType::f32 && gemms_->supports(product);  // in f32 its tanh is too rough
  product.gelu = fused;
  multiply(product, operand(source), operand(linear.weight), bias, result, linear.weight);
  if (activation != Activation::none && !fused && computes())
    activate(result.raw(), out, result.size(), activation == Activation::silu, stream_);
  return result;
}

void CudaBackend::add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) {
  check_residual(residual, y);
  const std::int64_t period = period_of("gate", residual, gate);
  if (!computes()) return;
  const RowNorm none{.rows = rows_of(residual), .width = static_cast<int>(residual.dim(-1))};
  add_gated_normalise(none, residual.data<float>(), y.raw(), y.dtype(), floats(gate), period, nullptr, DType::f32,
                      stream_);
}

Tensor CudaBackend::layer_norm(const Tensor& x, const NormArgs& args) {
  RowNorm norm = row_norm(x, args, recording_);
  Tensor out = empty(args.out, x.shape());
  if (args.out == DType::e4m3) norm.out_scales = scales_of(out);
  if (computes()) normalise(norm, x.data<float>(), out.raw(), args.out, stream_);
  return out;
}

Tensor CudaBackend::add_gated_norm(Tensor& residual, const Tensor& y, const Tensor& gate, const NormArgs& args) {
  check_residual(residual, y);
  RowNorm norm = row_norm(residual, args, recording_);
  const std::int64_t period = period_of("gate", residual, gate);
  Tensor out = empty(args.out, residual.shape());
  if (args.out == DType::e4m3) norm.out_scales = scales_of(out);
  if (computes())
    add_gated_normalise(norm, residual.data<float>(), y.raw(), y.dtype(), floats(gate), period, out.raw(), args.out,
                        stream_);
  return out;
}

Tensor CudaBackend::rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) {
  Tensor result = empty(out, x.shape());
  if (computes())
    normalise({.rows = rows_of(x),
               .width = static_cast<int>(x.dim(-1)),
               .period = std::max<std::int64_t>(rows_of(x), 1),
               .scale = floats(weight),
               .eps = eps,
               .centred = false},
              x.data<float>(), result.raw(), out, stream_);
  return result;
}

}  // namespace sparvar::cuda
