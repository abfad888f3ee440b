// Feature maps: large convolutions through cuDNN, the rest with own kernels.
#include <fmt/format.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

class CudaConvolution final : public Convolution {
 public:
  Tensor weight;  // [out, kernel, kernel, in], compute type
  Tensor bias;    // f32 [out]
  DType type = DType::bf16;
};

/// [out, in, kh, kw], any float type, on the host -> [out, kh, kw, in] f32.
Tensor channels_last(const Tensor& oihw) {
  const Tensor from = oihw.to(DType::f32);
  const std::int64_t out = from.dim(0), in = from.dim(1), area = from.dim(2) * from.dim(3);
  Tensor to = Tensor::empty(DType::f32, {out, from.dim(2), from.dim(3), in});
  for (std::int64_t o = 0; o < out; ++o)
    for (std::int64_t i = 0; i < in; ++i)
      for (std::int64_t p = 0; p < area; ++p)
        to.data<float>()[(o * area + p) * in + i] = from.data<float>()[(o * in + i) * area + p];
  return to;
}

void check_map(const Tensor& x, const char* what) {
  if (x.rank() != 4 || (x.dtype() != DType::f32 && x.dtype() != DType::bf16))
    throw Error(ErrorKind::usage, fmt::format("{} takes an F32 or BF16 map [B, H, W, C], got {} {}", what,
                                              name_of(x.dtype()), to_string(x.shape())));
}

}  // namespace

Cudnn* CudaBackend::cudnn() {
  if (!cudnn_ && why_no_cudnn_.empty()) cudnn_ = Cudnn::load(stream_, why_no_cudnn_);
  return cudnn_.get();
}

ConvolutionPtr CudaBackend::prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride,
                                                int pad_begin, int pad_end) {
  if (weight_oihw.rank() != 4 || weight_oihw.dim(2) != weight_oihw.dim(3) || weight_oihw.size() == 0)
    throw Error(ErrorKind::usage, fmt::format("weights of a convolution are [out, in, kernel, kernel], got {}",
                                              to_string(weight_oihw.shape())));
  if (bias.defined() && bias.size() != weight_oihw.dim(0))
    throw Error(ErrorKind::usage, fmt::format("a convolution to {} channels takes as many biases, got {}",
                                              weight_oihw.dim(0), to_string(bias.shape())));
  if (stride < 1 || pad_begin < 0 || pad_end < 0)
    throw Error(ErrorKind::usage,
                fmt::format("a convolution of stride {}, padding {} and {} is impossible", stride, pad_begin, pad_end));
  auto conv = std::make_shared<CudaConvolution>();
  conv->out = weight_oihw.dim(0);
  conv->in = weight_oihw.dim(1);
  conv->kernel = static_cast<int>(weight_oihw.dim(2));
  conv->stride = stride;
  conv->pad_begin = pad_begin;
  conv->pad_end = pad_end;
  conv->type = compute_;
  const auto load = [&](const Tensor& host, DType type) {
    Tensor to = weight_memory(type, host.shape());
    if (computes()) uploader_.copy(host, to);
    return to;
  };
  const Tensor full =
      computes() ? channels_last(weight_oihw) : weight_oihw.reshaped({conv->out, conv->kernel, conv->kernel, conv->in});
  conv->weight = load(full, compute_);
  conv->bias = load(bias.defined() ? bias : Tensor::zeros(DType::f32, {conv->out}), DType::f32);
  return conv;
}

/// Above this many multiply-adds times two cuDNN is more than twice as fast; below it the difference is nothing, and a
/// small model is done before cuDNN has started.
constexpr double kWorthCudnn = 8e9;

/// x is read as if enlarged twofold where `enlarged`.
Tensor CudaBackend::convolve(const Tensor& x, const Convolution& weights, const Tensor& residual, bool enlarged) {
  const auto& conv = dynamic_cast<const CudaConvolution&>(weights);
  if (x.rank() != 4 || x.dim(3) != conv.in)
    throw Error(ErrorKind::usage,
                fmt::format("convolution takes a map [B, H, W, {}], got {}", conv.in, to_string(x.shape())));
  OwnConvolution args{.type = conv.type,
                      .batch = static_cast<int>(x.dim(0)),
                      .height = static_cast<int>(x.dim(1)),
                      .width = static_cast<int>(x.dim(2)),
                      .in = static_cast<int>(conv.in),
                      .out = static_cast<int>(conv.out),
                      .kernel = conv.kernel,
                      .stride = conv.stride,
                      .pad_begin = conv.pad_begin,
                      .pad_end = conv.pad_end,
                      .enlarged = enlarged};
  const int seen = enlarged ? 2 : 1;
  if (std::min(args.height, args.width) * seen + conv.pad_begin + conv.pad_end < conv.kernel)
    throw Error(ErrorKind::usage,
                fmt::format("a map of {}x{} pixels is smaller than the {}x{} convolution it is put into",
                            x.dim(1) * seen, x.dim(2) * seen, conv.kernel, conv.kernel));
  Tensor out = empty(conv.type, {x.dim(0), args.out_height(), args.out_width(), conv.out});
  if (residual.defined() && residual.shape() != out.shape())
    throw Error(ErrorKind::usage, fmt::format("a residual of shape {} does not fit a convolution result of shape {}",
                                              to_string(residual.shape()), to_string(out.shape())));
  const Tensor source = converted(x, conv.type);
  const Tensor added = residual.defined() ? converted(residual, conv.type) : Tensor();
  args.x = source.raw();
  args.w = conv.weight.raw();
  args.bias = conv.bias.data<float>();
  args.residual = added.defined() ? added.raw() : nullptr;
  args.y = out.raw();
  weights_are_there();
  if (out.size() > 0 && !convolve_with_cudnn(args, source) && computes()) cuda::convolution(args, stream_);
  return out;
}

/// False where the own kernel is to be taken.
bool CudaBackend::convolve_with_cudnn(const OwnConvolution& args, const Tensor& x) {
  const double pixels = static_cast<double>(args.batch) * args.out_height() * args.out_width();
  const double work = 2 * pixels * args.out * args.kernel * args.kernel * args.in;
  if (args.type != DType::bf16 || work < kWorthCudnn) return false;
  const Tensor source = args.enlarged ? upsample_nearest_2x(x) : x;
  if (planning_) return true;  // the map above is what it needs beyond the own kernel
  const Cudnn::ConvolutionShape shape{.batch = args.batch,
                                      .height = static_cast<int>(source.dim(1)),
                                      .width = static_cast<int>(source.dim(2)),
                                      .in = args.in,
                                      .out = args.out,
                                      .kernel = args.kernel,
                                      .stride = args.stride,
                                      .pad_begin = args.pad_begin,
                                      .pad_end = args.pad_end,
                                      .residual = args.residual != nullptr};
  if (cudnn() == nullptr || !cudnn()->supports_convolution(shape)) return false;
  Tensor scratch = empty(DType::u8, {cudnn()->convolution_workspace(shape)});
  if (computes()) cudnn()->convolution(shape, source.raw(), args.w, args.bias, args.residual, args.y, scratch.raw());
  return true;
}

Tensor CudaBackend::convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) {
  return convolve(x, weights, residual, false);
}

Tensor CudaBackend::upsampled_convolution(const Tensor& x, const Convolution& weights) {
  return convolve(x, weights, {}, true);
}

Tensor CudaBackend::upsample_nearest_2x(const Tensor& x) {
  check_map(x, "upsampling");
  Tensor out = empty(x.dtype(), {x.dim(0), 2 * x.dim(1), 2 * x.dim(2), x.dim(3)});
  if (computes())
    cuda::upsample_nearest_2x(x.raw(), x.dtype(), static_cast<int>(x.dim(0)), static_cast<int>(x.dim(1)),
                              static_cast<int>(x.dim(2)), static_cast<int>(x.dim(3)), out.raw(), stream_);
  return out;
}

Tensor CudaBackend::group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                               bool silu) {
  check_map(x, "group norm");
  const std::int64_t channels = x.dim(3);
  if (groups < 1 || channels % groups != 0)
    throw Error(ErrorKind::usage, fmt::format("{} channels cannot be split into {} groups", channels, groups));
  const auto fits = [channels](const Tensor& t) { return t.dtype() == DType::f32 && t.size() == channels; };
  if (!fits(weight) || !fits(bias))
    throw Error(ErrorKind::usage,
                fmt::format("group norm of {} channels takes F32 weights and biases of that size, got {} and {}",
                            channels, to_string(weight.shape()), to_string(bias.shape())));
  const int batch = static_cast<int>(x.dim(0));
  const std::int64_t pixels = x.dim(1) * x.dim(2);
  Tensor out = empty(x.dtype(), x.shape());
  if (x.size() == 0) return out;
  Tensor scratch = empty(DType::u8, {group_norm_scratch(batch, pixels, static_cast<int>(channels), groups)});
  if (computes())
    cuda::group_norm(x.raw(), x.dtype(), batch, pixels, static_cast<int>(channels), groups, weight.data<float>(),
                     bias.data<float>(), eps, silu, scratch.raw(), out.raw(), stream_);
  return out;
}

Tensor CudaBackend::to_nhwc(const Tensor& x) {
  Tensor out = empty(DType::f32, {x.dim(0), x.dim(2), x.dim(3), x.dim(1)});
  if (computes())
    planes_to_pixels(x.data<float>(), static_cast<int>(x.dim(0)), static_cast<int>(x.dim(1)), x.dim(2) * x.dim(3),
                     out.raw(), DType::f32, stream_);
  return out;
}

Tensor CudaBackend::to_nchw(const Tensor& x, float limit) {
  Tensor out = empty(DType::f32, {x.dim(0), x.dim(3), x.dim(1), x.dim(2)});
  if (computes())
    pixels_to_planes(x.raw(), x.dtype(), static_cast<int>(x.dim(0)), static_cast<int>(x.dim(3)), x.dim(1) * x.dim(2),
                     limit, out.data<float>(), stream_);
  return out;
}

Tensor CudaBackend::to_bytes(const Tensor& x) {
  Tensor out = empty(DType::u8, x.shape());
  if (computes()) cuda::to_bytes(x.raw(), x.dtype(), x.size(), out.data<std::uint8_t>(), stream_);
  return out;
}

}  // namespace sparvar::cuda
