// The CPU device: oneDNN for matrix products and convolutions, own kernels for the rest.
// Each group of operations has a file of its own.
#pragma once

#include "backend/backend.h"

namespace sparvar {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options);
  DType compute_type() const override { return compute_; }
  std::string describe() const override;

  // linear.cpp
  LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, bool precise) override;
  Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) override;

  // norm.cpp
  void add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) override;
  Tensor layer_norm_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, float eps, DType out) override;
  Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps) override;
  Tensor rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) override;
  Tensor apply(const Tensor& x, Activation activation) override;

  // attention.cpp
  void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) override;
  void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) override;
  Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) override;
  void add_resized(Tensor& out, const Tensor& cache, Grid from, Grid to) override;
  Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) override;
  Tensor subtract(const Tensor& a, const Tensor& b) override;

  // text.cpp
  Tensor cross_attention(const Tensor& q, const Tensor& kv, const std::vector<int>& cu_lengths, float scale) override;
  Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias) override;
  Tensor gated_gelu(const Tensor& a, const Tensor& b) override;

  // convolution.cpp, feature_map.cpp
  ConvolutionPtr prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                     int pad_end) override;
  Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) override;
  Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                    bool silu) override;
  Tensor upsample_nearest_2x(const Tensor& x) override;

 private:
  DType compute_;
};

}  // namespace sparvar
