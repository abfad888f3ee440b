// 2-D convolutions through oneDNN, NHWC. Weights are packed once into each layout that oneDNN asks for.
#include <fmt/format.h>

#include <dnnl.hpp>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dnnl_support.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using dnnl::memory;
using Descriptor = dnnl::convolution_forward::primitive_desc;

struct Call {
  dnnl::convolution_forward primitive;
  DType type = DType::f32;  // of source, weights and result
  memory weights;
  memory::desc source;
  memory::desc target;
  memory::desc scratchpad;
};

/// What a primitive is made for.
struct Problem {
  std::int64_t batch = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  bool residual = false;
  bool operator<(const Problem& other) const {
    return std::tie(batch, height, width, residual) < std::tie(other.batch, other.height, other.width, other.residual);
  }
};

class CpuConvolution final : public Convolution {
 public:
  Tensor weight;  // [out, in, kernel, kernel], f32 or bf16
  Tensor bias;    // f32 [out], or undefined
  std::map<Problem, Call> calls;
  std::vector<memory> layouts;  // the weights in each type and layout a call asked for

  std::int64_t extent(std::int64_t pixels) const { return (pixels + pad_begin + pad_end - kernel) / stride + 1; }
};

memory::desc plain_weights(const CpuConvolution& conv, DType type) {
  return {{conv.out, conv.in, conv.kernel, conv.kernel}, dnnl_type(type), memory::format_tag::oihw};
}

memory weights_in(CpuConvolution& conv, const memory::desc& wanted) {
  for (const memory& known : conv.layouts)
    if (known.get_desc() == wanted) return known;
  memory source(plain_weights(conv, conv.weight.dtype()), dnnl_engine(), conv.weight.raw());
  memory packed(wanted, dnnl_engine());
  execute(dnnl::reorder(source, packed), {{DNNL_ARG_FROM, source}, {DNNL_ARG_TO, packed}});
  conv.layouts.push_back(packed);
  return packed;
}

/// Nothing where this machine has no such convolution (bf16 needs AVX-512).
std::optional<Descriptor> describe_call(const CpuConvolution& conv, const Problem& problem, DType type) {
  const auto data = dnnl_type(type);
  const memory::desc source({problem.batch, conv.in, problem.height, problem.width}, data, memory::format_tag::nhwc);
  const memory::desc target({problem.batch, conv.out, conv.extent(problem.height), conv.extent(problem.width)}, data,
                            memory::format_tag::nhwc);
  const memory::desc weights({conv.out, conv.in, conv.kernel, conv.kernel}, data, memory::format_tag::any);
  const memory::desc bias =
      conv.bias.defined() ? memory::desc({conv.out}, memory::data_type::f32, memory::format_tag::x) : memory::desc();
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (problem.residual) {
    dnnl::post_ops ops;
    ops.append_binary(dnnl::algorithm::binary_add, target);
    attributes.set_post_ops(ops);
  }
  const memory::dims strides{conv.stride, conv.stride};
  const memory::dims pad_begin{conv.pad_begin, conv.pad_begin};
  const memory::dims pad_end{conv.pad_end, conv.pad_end};
  const dnnl::convolution_forward::desc operation(dnnl::prop_kind::forward_inference,
                                                  dnnl::algorithm::convolution_direct, source, weights, bias, target,
                                                  strides, pad_begin, pad_end);
  Descriptor descriptor(operation, attributes, dnnl_engine(), /*allow_empty=*/true);
  if (!descriptor) return std::nullopt;
  return descriptor;
}

Call make_call(CpuConvolution& conv, const Problem& problem, DType compute) {
  require_memory_for_kernels();
  DType type = compute;
  auto descriptor = describe_call(conv, problem, type);
  if (!descriptor && type != DType::f32) descriptor = describe_call(conv, problem, type = DType::f32);
  if (!descriptor)
    throw Error(ErrorKind::system,
                fmt::format("oneDNN has no {}x{} convolution from {} to {} channels for this machine", conv.kernel,
                            conv.kernel, conv.in, conv.out));
  return {dnnl::convolution_forward(*descriptor),
          type,
          weights_in(conv, descriptor->weights_desc()),
          descriptor->src_desc(),
          descriptor->dst_desc(),
          descriptor->scratchpad_desc()};
}

/// Shape of the result; throws where `x` or `residual` do not fit.
Shape result_shape(const CpuConvolution& conv, const Tensor& x, const Tensor& residual) {
  if (x.rank() != 4 || x.dim(3) != conv.in)
    throw Error(ErrorKind::usage,
                fmt::format("convolution takes a map [B, H, W, {}], got {}", conv.in, to_string(x.shape())));
  const std::int64_t smallest = conv.kernel - conv.pad_begin - conv.pad_end;
  if (x.dim(1) < smallest || x.dim(2) < smallest)
    throw Error(ErrorKind::usage,
                fmt::format("a map of {}x{} pixels is smaller than the {}x{} convolution it is put into", x.dim(1),
                            x.dim(2), conv.kernel, conv.kernel));
  Shape shape{x.dim(0), conv.extent(x.dim(1)), conv.extent(x.dim(2)), conv.out};
  if (residual.defined() && residual.shape() != shape)
    throw Error(ErrorKind::usage, fmt::format("a residual of shape {} does not fit a convolution result of shape {}",
                                              to_string(residual.shape()), to_string(shape)));
  return shape;
}

Tensor as_type(const Tensor& x, DType type) { return x.dtype() == type ? x : convert(x, type); }

}  // namespace

ConvolutionPtr CpuBackend::prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                               int pad_end) {
  if (weight_oihw.rank() != 4 || weight_oihw.dim(2) != weight_oihw.dim(3) || weight_oihw.size() == 0)
    throw Error(ErrorKind::usage, fmt::format("weights of a convolution are [out, in, kernel, kernel], got {}",
                                              to_string(weight_oihw.shape())));
  if (bias.defined() && bias.size() != weight_oihw.dim(0))
    throw Error(ErrorKind::usage, fmt::format("a convolution to {} channels takes as many biases, got {}",
                                              weight_oihw.dim(0), to_string(bias.shape())));
  if (stride < 1 || pad_begin < 0 || pad_end < 0)
    throw Error(ErrorKind::usage,
                fmt::format("a convolution of stride {}, padding {} and {} is impossible", stride, pad_begin, pad_end));
  auto conv = std::make_shared<CpuConvolution>();
  conv->out = weight_oihw.dim(0);
  conv->in = weight_oihw.dim(1);
  conv->kernel = static_cast<int>(weight_oihw.dim(2));
  conv->stride = stride;
  conv->pad_begin = pad_begin;
  conv->pad_end = pad_end;
  conv->weight = weight_oihw.dtype() == compute_ ? weight_oihw : weight_oihw.to(compute_);
  if (bias.defined()) conv->bias = bias.to(DType::f32);
  return conv;
}

Tensor CpuBackend::convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) try {
  // The cache of primitives is no part of the value; a backend serves one thread.
  auto& conv = const_cast<CpuConvolution&>(dynamic_cast<const CpuConvolution&>(weights));  // NOLINT
  const Shape shape = result_shape(conv, x, residual);
  if (x.size() == 0) return Tensor::empty(compute_, shape);

  const Problem problem{x.dim(0), x.dim(1), x.dim(2), residual.defined()};
  auto found = conv.calls.find(problem);
  if (found == conv.calls.end()) found = conv.calls.emplace(problem, make_call(conv, problem, compute_)).first;
  Call& call = found->second;

  Tensor source = as_type(x, call.type);
  Tensor result = Tensor::empty(call.type, shape);
  Tensor scratch = Tensor::empty(DType::u8, {static_cast<std::int64_t>(call.scratchpad.get_size())});
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, memory(call.source, dnnl_engine(), source.raw())},
                                       {DNNL_ARG_WEIGHTS, call.weights},
                                       {DNNL_ARG_DST, memory(call.target, dnnl_engine(), result.raw())},
                                       {DNNL_ARG_SCRATCHPAD, memory(call.scratchpad, dnnl_engine(), scratch.raw())}};
  if (conv.bias.defined()) {
    const memory::desc bias({conv.out}, memory::data_type::f32, memory::format_tag::x);
    args.emplace(DNNL_ARG_BIAS, memory(bias, dnnl_engine(), conv.bias.raw()));
  }
  Tensor added;
  if (residual.defined()) {
    added = as_type(residual, call.type);
    args.emplace(DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, memory(call.target, dnnl_engine(), added.raw()));
  }
  execute(call.primitive, args);
  return as_type(result, compute_);
} catch (const dnnl::error& failure) {
  rethrow(failure);
}

Tensor CpuBackend::upsampled_convolution(const Tensor& x, const Convolution& weights) {
  return convolution(upsample_nearest_2x(x), weights, {});
}

}  // namespace sparvar
