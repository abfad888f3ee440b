// The operations models are written in. models/ never names a device; a device implements this header.
// Tensors are contiguous. "compute type" is bf16 or f32: the type of matrix-product inputs and of the KV cache;
// sums, norms and the residual stream are f32. Pictures and feature maps are NHWC.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "attention/key_lists.h"
#include "core/tensor.h"

namespace sparvar {

enum class Activation { none, gelu_tanh, silu };

/// Weights of y = x W^T + b, packed for the device. W is [out, in].
class Linear {
 public:
  virtual ~Linear() = default;
  std::int64_t in = 0;
  std::int64_t out = 0;
};
using LinearPtr = std::shared_ptr<Linear>;

/// Weights of a 2-D convolution. Padding in pixels: top/left and bottom/right may differ (the encoder's stride-2 form).
class Convolution {
 public:
  virtual ~Convolution() = default;
  std::int64_t in = 0;
  std::int64_t out = 0;
  int kernel = 3;
  int stride = 1;
  int pad_begin = 1;
  int pad_end = 1;
};
using ConvolutionPtr = std::shared_ptr<Convolution>;

/// Buffers of one attention call. q [B, H, n, D], k and v [B, H, capacity, D] (compute type, D contiguous; of the
/// capacity the lists say which rows are read), out [B, n, H, D] (compute type).
struct AttentionArgs {
  Tensor q;
  Tensor k;
  Tensor v;
  Tensor out;
  float scale = 1.0F;
  /// Optional f32 [B, H, n, 2]: per query the largest logit and the sum of exp(logit - largest).
  Tensor statistics;
};

/// How q and k are made from the qkv product (SelfAttention of upstream basic.py).
struct QkvArgs {
  int heads = 0;
  bool l2_norm = true;      // q, k to unit length per head (cos_attn)
  Tensor head_scale;        // f32 [H]: q is multiplied by it
  Tensor rope;              // f32 [n, D/2, 2]: (cos, sin) per pair (2i, 2i+1); undefined: no rotation
  std::int64_t offset = 0;  // first row of this scale in the cache
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual DType compute_type() const = 0;
  virtual std::string describe() const = 0;  // e.g. "cpu, avx512-bf16, 2 threads"

  // ---- weights
  /// `precise`: multiply in f32 whatever the compute type (small layers that everything after them hangs on). Bias may
  /// be undefined.
  virtual LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, bool precise = false) = 0;
  virtual ConvolutionPtr prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                             int pad_end) = 0;

  // ---- dense layers
  /// act(x W^T + b): x [rows, in] (f32 or compute type) -> [rows, out] of type `out`.
  virtual Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) = 0;
  /// residual[b, i, :] += gate[b, :] * y[b, i, :]; residual f32 [B, n, C], gate f32 [B, C] or undefined (1), y f32 or
  /// compute type.
  virtual void add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) = 0;
  /// LayerNorm(x) * (1 + scale[b]) + shift[b], x f32 [B, n, C], scale/shift f32 [B, C]; -> type `out`.
  virtual Tensor layer_norm_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, float eps,
                                     DType out) = 0;
  /// LayerNorm(x) * weight + bias (either may be undefined); x f32 [..., C] -> compute type.
  virtual Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps) = 0;
  /// x / sqrt(mean(x^2) + eps) * weight; x f32 [rows, C] -> type `out`.
  virtual Tensor rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) = 0;
  virtual Tensor apply(const Tensor& x, Activation activation) = 0;  // f32 -> f32

  // ---- attention
  /// Splits qkv [B, n, 3, H, D], normalises, scales and rotates q and k; q goes to `q` [B, H, n, D], k and v to rows
  /// [offset, offset + n) of the caches [B, H, capacity, D].
  virtual void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) = 0;
  /// Every tile of queries attends to its list of keys. Queries in no tile keep
  /// what `out` held; empty lists give zeros.
  virtual void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) = 0;
  /// f32 [B * H, groups, keys]: per group of queries and key, the sum of softmax probabilities over all `keys` keys.
  virtual Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) = 0;
  /// out [B, to.tokens, H, D] += bilinear resize (align_corners = false) of cache f32 [B, from.tokens, H, D].
  virtual void add_resized(Tensor& out, const Tensor& cache, Grid from, Grid to) = 0;
  /// Rows of x [B, n, H, D] -> f32 [B, rows, H, D].
  virtual Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) = 0;
  /// a - b, any float types -> f32.
  virtual Tensor subtract(const Tensor& a, const Tensor& b) = 0;
  /// Attention over short packed texts: q [B, n, H, D], kv [total, 2, H, D] (compute type), cu_lengths [B + 1] -> [B,
  /// n, H, D].
  virtual Tensor cross_attention(const Tensor& q, const Tensor& kv, const std::vector<int>& cu_lengths,
                                 float scale) = 0;
  /// Text self attention, one text: q, k, v [T, H, D] f32, bias f32 [H, T, T] added to the logits -> f32 [T, H, D].
  virtual Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias) = 0;
  /// gelu_tanh(a) * b, elementwise, f32.
  virtual Tensor gated_gelu(const Tensor& a, const Tensor& b) = 0;

  // ---- feature maps, NHWC
  /// x [B, H, W, in] (f32 or compute type) -> [B, H', W', out] compute type. `residual` (same shape as the result) is
  /// added where defined.
  virtual Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) = 0;
  /// GroupNorm (affine), then SiLU where asked; statistics in f32.
  virtual Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                            bool silu) = 0;
  virtual Tensor upsample_nearest_2x(const Tensor& x) = 0;
};

struct CpuOptions {
  DType compute = DType::bf16;
  int threads = 0;  // 0: all cores
};
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

}  // namespace sparvar
