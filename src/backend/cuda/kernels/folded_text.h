// Around the products of folded cross attention (backend.h, FoldedText): texts of different lengths as equally long
// ones, and the softmax of their logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sparvar::cuda {

/// kv bf16 [tokens of all texts, 2, heads, dim] -> keys and values bf16 [texts, heads, length, dim], 0 beyond a text,
/// and bias f32 [texts, heads, length]: the product of a key with query_bias [heads, dim], which may be null.
struct SpreadText {
  const void* kv = nullptr;
  const std::int32_t* cu_lengths = nullptr;  // [texts + 1]
  const float* query_bias = nullptr;
  int texts = 0, heads = 0, dim = 0, length = 0;
  void* keys = nullptr;
  void* values = nullptr;
  float* bias = nullptr;
};
void spread_text(const SpreadText& args, cudaStream_t stream);

/// logits f32 [texts, rows, heads, length] -> weights bf16 of the same shape: softmax of scale * (logits + bias) over
/// the tokens of a text, 0 beyond it. bias f32 [texts, heads, length]. An empty text has weights 0.
struct SoftmaxOfText {
  const float* logits = nullptr;
  const float* bias = nullptr;
  const std::int32_t* cu_lengths = nullptr;
  int texts = 0;
  std::int64_t rows = 0;
  int heads = 0, length = 0;
  float scale = 1.0F;
  void* weights = nullptr;
  static constexpr int kLongest = 128;
};
void softmax_of_text(const SoftmaxOfText& args, cudaStream_t stream);

}  // namespace sparvar::cuda
