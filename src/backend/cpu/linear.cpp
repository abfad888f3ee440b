// Matrix products through oneDNN. Weights are packed once into the layout oneDNN prefers for large inputs.
#include <fmt/format.h>

#include <cstring>
#include <dnnl.hpp>
#include <mutex>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dnnl_support.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using dnnl::memory;

struct Call {
  dnnl::matmul primitive;
  memory weights;
  memory::desc source;
  memory::desc target;
  memory::desc scratchpad;
};

/// oneDNN weights of one product, and the primitives made for the shapes seen so far.
class CpuLinear final : public Linear {
 public:
  Tensor packed;                                  // [out, in], f32 or bf16
  Tensor bias;                                    // f32 [out] or undefined
  std::unordered_map<std::uint64_t, Call> calls;  // by rows, activation, output type
  std::vector<memory> layouts;                    // the weights in each layout a call asked for
};

dnnl::primitive_attr attributes(Activation activation) {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (activation == Activation::none) return attr;
  dnnl::post_ops ops;
  if (activation == Activation::gelu_tanh)
    ops.append_eltwise(1.0F, dnnl::algorithm::eltwise_gelu_tanh, 0.0F, 0.0F);
  else
    ops.append_eltwise(1.0F, dnnl::algorithm::eltwise_swish, 1.0F, 0.0F);
  attr.set_post_ops(ops);
  return attr;
}

memory weights_in(CpuLinear& linear, const memory::desc& wanted) {
  for (const memory& known : linear.layouts)
    if (known.get_desc() == wanted) return known;
  memory::desc plain({linear.in, linear.out}, dnnl_type(linear.packed.dtype()), memory::format_tag::ba);
  memory source(plain, dnnl_engine(), linear.packed.raw());
  if (wanted == plain) {
    linear.layouts.push_back(source);
    return source;
  }
  memory reordered(wanted, dnnl_engine());
  execute(dnnl::reorder(source, reordered), {{DNNL_ARG_FROM, source}, {DNNL_ARG_TO, reordered}});
  linear.layouts.push_back(reordered);
  return reordered;
}

Call make_call(CpuLinear& linear, std::int64_t rows, Activation activation, DType out) {
  require_memory_for_kernels();
  const auto type = dnnl_type(linear.packed.dtype());
  const memory::desc source({rows, linear.in}, type, memory::format_tag::ab);
  const memory::desc weights({linear.in, linear.out}, type, memory::format_tag::any);
  const memory::desc target({rows, linear.out}, dnnl_type(out), memory::format_tag::ab);
  const auto attr = attributes(activation);
  dnnl::matmul::primitive_desc desc;
  if (linear.bias.defined()) {
    const memory::desc bias({1, linear.out}, memory::data_type::f32, memory::format_tag::ab);
    desc = {dnnl::matmul::desc(source, weights, bias, target), attr, dnnl_engine()};
  } else {
    desc = {dnnl::matmul::desc(source, weights, target), attr, dnnl_engine()};
  }
  return {dnnl::matmul(desc), weights_in(linear, desc.weights_desc()), source, target, desc.scratchpad_desc()};
}

/// Products are of multiples of so many rows, so that a row's result does not depend on how many there are: a picture
/// is the same in every batch. 1: any number of rows will do.
/// Without AVX-512 oneDNN takes f32 rows 24 at a time, shares these blocks among the threads, and rounds the rows of an
/// incomplete block otherwise: multiples are whole blocks for every thread. A single bf16 row goes through other code
/// than several (seen with AMX, and with AVX-512 that has no bf16).
std::int64_t whole_rows(DType type, std::int64_t rows) {
  if (type == DType::bf16) return rows == 1 ? 2 : 1;
  static const bool by_blocks = [] {
    const memory::desc square({256, 256}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(square, square, square), dnnl::primitive_attr(),
                                            dnnl_engine());
    return std::string_view(desc.impl_info_str()).starts_with("gemm");
  }();
  return by_blocks ? std::int64_t{24} * usable_threads() : 1;
}

/// The product of `rows` rows from `source` on, into `target`.
void multiply(CpuLinear& linear, std::int64_t rows, void* source, Activation activation, DType out, void* target) {
  const std::uint64_t key = (static_cast<std::uint64_t>(rows) << 8) | (static_cast<std::uint64_t>(activation) << 4) |
                            static_cast<std::uint64_t>(out);
  auto found = linear.calls.find(key);
  if (found == linear.calls.end()) found = linear.calls.emplace(key, make_call(linear, rows, activation, out)).first;
  Call& call = found->second;

  Tensor scratch = Tensor::empty(DType::u8, {static_cast<std::int64_t>(call.scratchpad.get_size())});
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, memory(call.source, dnnl_engine(), source)},
                                       {DNNL_ARG_WEIGHTS, call.weights},
                                       {DNNL_ARG_DST, memory(call.target, dnnl_engine(), target)},
                                       {DNNL_ARG_SCRATCHPAD, memory(call.scratchpad, dnnl_engine(), scratch.raw())}};
  if (linear.bias.defined())
    args.emplace(DNNL_ARG_BIAS, memory({{1, linear.out}, memory::data_type::f32, memory::format_tag::ab}, dnnl_engine(),
                                       linear.bias.raw()));
  execute(call.primitive, args);
}

}  // namespace

bool multiplies_bf16() {
  static const bool supported = [] {
    const memory::desc square({16, 16}, memory::data_type::bf16, memory::format_tag::ab);
    return static_cast<bool>(dnnl::matmul::primitive_desc(dnnl::matmul::desc(square, square, square),
                                                          dnnl::primitive_attr(), dnnl_engine(), true));
  }();
  return supported;
}

LinearPtr CpuBackend::prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind) {
  const DType type = kind == LinearKind::precise || !multiplies_bf16() ? DType::f32 : compute_;
  auto linear = std::make_shared<CpuLinear>();
  linear->out = weight.dim(0);
  linear->in = weight.dim(1);
  linear->input = kind == LinearKind::precise ? DType::f32 : compute_;
  linear->packed = weight.dtype() == type ? weight : weight.to(type);
  if (bias.defined()) linear->bias = bias.to(DType::f32);
  return linear;
}

Tensor CpuBackend::linear(const Tensor& x, const Linear& weights, Activation activation, DType out) try {
  // The cache of primitives is no part of the value; a backend serves one thread.
  auto& linear = const_cast<CpuLinear&>(dynamic_cast<const CpuLinear&>(weights));  // NOLINT
  if (x.dim(-1) != linear.in)
    throw Error(ErrorKind::usage,
                fmt::format("linear layer takes {} channels, got {}", linear.in, to_string(x.shape())));
  const DType type = linear.packed.dtype();
  Tensor source = x.dtype() == type ? x : convert(x, type);
  const std::int64_t rows = linear.in == 0 ? 0 : source.size() / linear.in;
  if (out == DType::bf16 && type == DType::f32)
    return convert(this->linear(source, weights, activation, DType::f32), out);
  Shape shape = x.shape();
  shape.back() = linear.out;
  Tensor result = Tensor::empty(out, shape);
  if (rows == 0) return result;

  const std::int64_t unit = whole_rows(type, rows), whole = rows / unit * unit, rest = rows - whole;
  if (whole > 0) multiply(linear, whole, source.raw(), activation, out, result.raw());
  if (rest > 0) {
    Tensor padded = Tensor::zeros(type, {unit, linear.in}), product = Tensor::empty(out, {unit, linear.out});
    const std::size_t from = static_cast<std::size_t>(whole * linear.in) * size_of(type),
                      to = static_cast<std::size_t>(whole * linear.out) * size_of(out);
    std::memcpy(padded.raw(), static_cast<const std::byte*>(source.raw()) + from, source.bytes() - from);
    multiply(linear, unit, padded.raw(), activation, out, product.raw());
    std::memcpy(static_cast<std::byte*>(result.raw()) + to, product.raw(), result.bytes() - to);
  }
  return result;
} catch (const dnnl::error& failure) {
  rethrow(failure);
}

}  // namespace sparvar
