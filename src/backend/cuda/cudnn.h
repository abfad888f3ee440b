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
  /// y = conv(x, w) + bias (+ residual), bf16 with f32 bias and sums; x, y, residual NHWC, w KRSC.
  struct ConvolutionShape {
    int batch = 1, height = 0, width = 0, in = 0, out = 0;
    int kernel = 1, stride = 1, pad_begin = 0, pad_end = 0;
    bool residual = false;

    int out_height() const { return (height + pad_begin + pad_end - kernel) / stride + 1; }
    int out_width() const { return (width + pad_begin + pad_end - kernel) / stride + 1; }
    // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 sees a 0 in it
    std::strong_ordering operator<=>(const ConvolutionShape&) const = default;
  };
  /// bf16, no mask; element (b, i, h, d) of q at b * q_batch + i * q_row + h * q_head + d, the others alike, v as k.
  struct AttentionShape {
    int batch = 1, heads = 1, queries = 0, keys = 0, dim = 0;
    std::int64_t q_batch = 0, q_row = 0, q_head = 0;
    std::int64_t k_batch = 0, k_row = 0, k_head = 0;
    std::int64_t out_batch = 0, out_row = 0, out_head = 0;
    float scale = 1;
    bool statistics = false;  // the logarithm of each query's sum of exponentials too
    // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 sees a 0 in it
    std::partial_ordering operator<=>(const AttentionShape&) const = default;
  };

  /// Null where the library cannot be loaded; `why` then says so.
  static std::unique_ptr<Cudnn> load(cudaStream_t stream, std::string& why);
  Cudnn(const Cudnn&) = delete;
  Cudnn& operator=(const Cudnn&) = delete;
  ~Cudnn();
  std::string version() const;  // "9.1.0"
  /// Calls go to this stream from now on.
  void use(cudaStream_t stream);

  /// Does cuDNN have a plan? All other calls throw Error(system) where it has none.
  bool supports_convolution(const ConvolutionShape& shape);
  std::int64_t convolution_workspace(const ConvolutionShape& shape);  // bytes
  void convolution(const ConvolutionShape& shape, const void* x, const void* w, const float* bias, const void* residual,
                   void* y, void* workspace);

  bool supports_attention(const AttentionShape& shape);
  std::int64_t attention_workspace(const AttentionShape& shape);
  /// `log_sums` f32 [batch, heads, queries]: written where the shape has statistics.
  void attention(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out, float* log_sums,
                 void* workspace);

 private:
  struct State;
  explicit Cudnn(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sparvar::cuda
