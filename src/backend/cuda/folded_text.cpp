// Cross attention with the projections of queries and outputs taken into the text (FoldedText): per token H * length
// columns and rows in the place of C. At 8B geometry and 40 tokens, 1120 for 3584.
#include "backend/cuda/kernels/folded_text.h"

#include <fmt/format.h>

#include "backend/cuda/cuda_backend.h"

namespace sparvar::cuda {
namespace {

/// Of x, measured. Unfolded, fewer are few_rows.cu's, which reads weights while the kernel before it runs.
constexpr std::int64_t kLeastRows = 64;
constexpr std::int64_t kNarrowest = 256;  // of a model: smaller products take no longer than their launches

std::int64_t padded(std::int64_t length) { return (length + 7) / 8 * 8; }

const CudaLinear& on_gpu(const Linear& linear) { return dynamic_cast<const CudaLinear&>(linear); }

}  // namespace

std::int64_t CudaBackend::folded_rows(const Linear& query, const Linear& out, int heads, std::int64_t texts,
                                      std::int64_t longest) const {
  const std::int64_t width = query.in, length = padded(longest);
  const bool is_bf16 = on_gpu(query).weight.dtype() == DType::bf16 && on_gpu(out).weight.dtype() == DType::bf16;
  if (older_.text || !is_bf16 || width < kNarrowest || width % (8 * std::int64_t{heads}) != 0) return 0;
  const bool is_short = length > 0 && length <= SoftmaxOfText::kLongest && texts * heads * length <= width;
  return is_short ? kLeastRows : 0;
}

FoldedText CudaBackend::fold_text(const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest, const Linear& query,
                                  const Linear& out) {
  const CudaLinear& asks = on_gpu(query);
  const CudaLinear& answers = on_gpu(out);
  const std::int64_t heads = kv.dim(2), dim = kv.dim(3), width = heads * dim;
  const std::int64_t rows = cu_lengths.size() - 1, length = padded(longest);
  if (kv.dtype() != DType::bf16 || asks.weight.shape() != Shape{width, width} ||
      answers.weight.shape() != Shape{width, width})
    throw Error(ErrorKind::usage,
                fmt::format("folded text: keys {} do not fit projections {} and {}", to_string(kv.shape()),
                            to_string(asks.weight.shape()), to_string(answers.weight.shape())));
  FoldedText folded{.keys = empty(DType::bf16, {rows, heads * length, width}),
                    .bias = empty(DType::f32, {rows, heads * length}),
                    .values = empty(DType::bf16, {rows, heads * length, width})};
  Tensor keys = empty(DType::bf16, {rows, heads * length, dim});
  Tensor values = empty(DType::bf16, keys.shape());
  if (computes()) {
    weights_are_there();
    spread_text({.kv = kv.raw(),
                 .cu_lengths = cu_lengths.data<std::int32_t>(),
                 .query_bias = asks.bias_f32.defined() ? asks.bias_f32.data<float>() : nullptr,
                 .texts = static_cast<int>(rows),
                 .heads = static_cast<int>(heads),
                 .dim = static_cast<int>(dim),
                 .length = static_cast<int>(length),
                 .keys = keys.raw(),
                 .values = values.raw(),
                 .bias = folded.bias.data<float>()},
                stream_);
  }
  // W_q is [head and channel, C]: of a head as it is, turned; W_o is [C, head and channel]: of a head some columns.
  const GemmShape asking{.rows = length, .in = dim, .out = width, .turned = true, .batch = heads};
  const GemmShape answering{.rows = length, .in = dim, .out = width, .batch = heads, .w_row = width, .w_batch = dim};
  for (std::int64_t row = 0; row < rows; ++row) {
    Tensor to_ask = folded.keys.rows(row, row + 1), to_answer = folded.values.rows(row, row + 1);
    multiply(asking, {keys.rows(row, row + 1).raw()}, {asks.weight.raw()}, Tensor(), to_ask, asks.weight);
    multiply(answering, {values.rows(row, row + 1).raw()}, {answers.weight.raw()}, Tensor(), to_answer, answers.weight);
  }
  return folded;
}

Tensor CudaBackend::folded_cross_attention(const Tensor& x, const FoldedText& text, const Tensor& cu_lengths, int heads,
                                           const Linear& projection, float scale, DType out) {
  const CudaLinear& answers = on_gpu(projection);
  const std::int64_t rows = x.dim(0), n = x.dim(1), width = x.dim(2), columns = text.keys.dim(1);
  if (x.dtype() != DType::bf16 || text.keys.shape() != Shape{rows, columns, width} || columns % heads != 0 ||
      cu_lengths.size() != rows + 1)
    throw Error(ErrorKind::usage,
                fmt::format("folded cross attention: {} {} does not fit keys {} of {} texts", name_of(x.dtype()),
                            to_string(x.shape()), to_string(text.keys.shape()), cu_lengths.size() - 1));
  Tensor logits = empty(DType::f32, {rows, n, columns});
  multiply({.rows = n, .in = width, .out = columns, .result = DType::f32, .batch = rows}, {x.raw()}, {text.keys.raw()},
           Tensor(), logits, answers.weight);
  Tensor weights = empty(DType::bf16, logits.shape());
  if (computes())
    softmax_of_text({.logits = logits.data<float>(),
                     .bias = text.bias.data<float>(),
                     .cu_lengths = cu_lengths.data<std::int32_t>(),
                     .texts = static_cast<int>(rows),
                     .rows = n,
                     .heads = heads,
                     .length = static_cast<int>(columns / heads),
                     .scale = scale,
                     .weights = weights.raw()},
                    stream_);
  logits = Tensor();
  Tensor result = empty(out, x.shape());
  const Tensor& bias = out == DType::f32 ? answers.bias_f32 : answers.bias_bf16;
  multiply(
      {.rows = n, .in = columns, .out = width, .result = out, .bias = bias.defined(), .turned = true, .batch = rows},
      {weights.raw()}, {text.values.raw()}, bias, result, answers.weight);
  return result;
}

}  // namespace sparvar::cuda
