// Convolutions and dense attention through cuDNN, which is loaded when a GPU is used. Plans are built once per shape.
#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <cstdint>
#include <memory>
#include <string>

#include "core/tensor.h"

namespace sparvar::cuda {

/// Calls go to one stream and may be captured into a CUDA graph, once their plan is there: convolution_workspace() and
/// attention_workspace() build it, outside capture. Graphs captured so must not be launched after this object is gone.
class Cudnn {
 public:
  /// y = conv(x, w) + bias (+ residual); x, y, residual NHWC and w KRSC of `type`, bias f32; sums in f32, and of f32
  /// inputs without tensor cores.
  struct ConvolutionShape {
    int batch = 1, height = 0, width = 0, in = 0, out = 0;
    int kernel_h = 1, kernel_w = 1, stride = 1;
    int pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
    DType type = DType::bf16;
    bool residual = false;
    /// Elements from one n, h, w of y to the next; 0: dense NHWC. A residual is always dense.
    std::int64_t out_stride_n = 0, out_stride_h = 0, out_stride_w = 0;

    int out_height() const { return (height + pad_top + pad_bottom - kernel_h) / stride + 1; }
    int out_width() const { return (width + pad_left + pad_right - kernel_w) / stride + 1; }
    std::strong_ordering operator<=>(const ConvolutionShape&) const = default;
  };
  /// bf16, no mask; element (b, i, h, d) of q at b * q_batch + i * q_row + h * q_head + d, the others alike, v as k.
  struct AttentionShape {
    int batch = 1, heads = 1, queries = 0, keys = 0, dim = 0;
    std::int64_t q_batch = 0, q_row = 0, q_head = 0;
    std::int64_t k_batch = 0, k_row = 0, k_head = 0;
    std::int64_t out_batch = 0, out_row = 0, out_head = 0;
    float scale = 1;
    std::partial_ordering operator<=>(const AttentionShape&) const = default;
  };

  /// Null where the library cannot be loaded; `why` then says so.
  static std::unique_ptr<Cudnn> load(cudaStream_t stream, std::string& why);
  Cudnn(const Cudnn&) = delete;
  Cudnn& operator=(const Cudnn&) = delete;
  ~Cudnn();
  std::string version() const;  // "9.1.0"

  /// Does cuDNN have a plan? All other calls throw Error(system) where it has none.
  bool supports_convolution(const ConvolutionShape& shape);
  /// Bytes; may become smaller or larger in tune().
  std::int64_t convolution_workspace(const ConvolutionShape& shape);
  void convolution(const ConvolutionShape& shape, const void* x, const void* w, const float* bias, const void* residual,
                   void* y, void* workspace);
  /// Measures the first candidates that need no more than `max_workspace` bytes and keeps the fastest. Overwrites y.
  void tune(const ConvolutionShape& shape, const void* x, const void* w, const float* bias, const void* residual,
            void* y, void* workspace, std::int64_t max_workspace);

  bool supports_attention(const AttentionShape& shape);
  std::int64_t attention_workspace(const AttentionShape& shape);
  void attention(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out, void* workspace);

 private:
  struct State;
  explicit Cudnn(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// kernels/feature_map.cu: y += bias (+ residual) for convolutions that cuDNN cannot fuse it into. y and residual of
/// `type`; strides of y as in ConvolutionShape, none of them 0; residual dense.
struct ConvolutionEpilogue {
  int batch = 0, height = 0, width = 0, channels = 0;
  DType type = DType::bf16;
  std::int64_t stride_n = 0, stride_h = 0, stride_w = 0;
};
void add_bias_and_residual(const ConvolutionEpilogue& shape, const float* bias, const void* residual, void* y,
                           cudaStream_t stream);

}  // namespace sparvar::cuda
