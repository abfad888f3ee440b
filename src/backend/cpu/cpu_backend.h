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
  std::string why() const override;

  // running.cpp
  bool records() const override { return false; }
  ProgramPtr program(std::function<void()> body) override;
  MarkPtr mark() override;
  void reserve(const std::function<void()>&) override {}
  MemoryUse memory_use() const override { return {}; }
  int recordings() const override { return 0; }
  std::vector<ProductTime> product_times() const override { return {}; }
  int length_step() const override { return 1; }
  DType product_type() const override { return DType::f32; }

  // tensors.cpp
  Tensor empty(DType dtype, Shape shape) override { return Tensor::empty(dtype, std::move(shape)); }
  Tensor zeros(DType dtype, Shape shape) override { return Tensor::zeros(dtype, std::move(shape)); }
  Tensor random(DType dtype, Shape shape, std::uint64_t seed, float deviation) override;
  Tensor upload(const Tensor& host) override { return host; }
  Tensor download(const Tensor& tensor) override { return tensor; }
  void write(Tensor& to, const Tensor& from) override;
  void fill_zero(Tensor& x) override;
  Tensor clone(const Tensor& x) override { return x.to(x.dtype()); }
  Tensor repeat(const Tensor& x, int times) override;
  Tensor grown(const Tensor& cache, std::int64_t more) override;

  // linear.cpp
  LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind) override;
  Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) override;

  // norm.cpp
  void add_gated(Tensor& residual, const Tensor& y, const Tensor& gate) override;
  Tensor layer_norm(const Tensor& x, const NormArgs& args) override;
  Tensor add_gated_norm(Tensor& residual, const Tensor& y, const Tensor& gate, const NormArgs& args) override;
  Tensor rms_norm(const Tensor& x, const Tensor& weight, float eps, DType out) override;

  // elementwise.cpp
  Tensor apply(const Tensor& x, Activation activation) override;
  void add_repeated(Tensor& x, const Tensor& y) override;
  Tensor modulation(const Tensor& shared, const Tensor& own, int parts) override;
  void guide_hidden(Tensor& x, const Tensor& guidance) override;
  Tensor guide_logits(const Tensor& logits, std::int64_t pictures, const Tensor& guidance) override;
  Tensor sample_bits(const Tensor& logits, const Tensor& sampling, int scale) override;
  void add_codes(Tensor& summed, const Tensor& bits, Grid tokens, bool patchify) override;
  Tensor codes_to_words(const Tensor& summed, Grid tokens, bool patchify) override;

  // attention.cpp
  void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) override;
  void dense_attention(AttentionArgs& args, int keys) override;
  void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) override;
  AttentionListsPtr prepare_lists(const QueryTiles& tiles, const KeyLists& lists) override;
  void attention(AttentionArgs& args, const AttentionLists& lists) override;
  void select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) override;
  AttentionRecipePtr prepare_recipe(const ListRecipe& recipe) override;
  void attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) override;
  Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) override;
  void add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) override;
  Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) override;
  Tensor gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) override;
  void subtract(const Tensor& a, const Tensor& b, Tensor& out) override;

  // text.cpp
  Tensor cross_attention(const Tensor& q, const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest, float scale,
                         bool settled) override;
  Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                          const Tensor& length) override;
  Tensor gated_gelu(const Tensor& a, const Tensor& b) override;

  // convolution.cpp, feature_map.cpp
  ConvolutionPtr prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                     int pad_end) override;
  Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) override;
  Tensor upsampled_convolution(const Tensor& x, const Convolution& weights) override;
  Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                    bool silu) override;
  Tensor upsample_nearest_2x(const Tensor& x) override;
  Tensor to_nhwc(const Tensor& x) override;
  Tensor to_nchw(const Tensor& x, float limit) override;
  Tensor to_bytes(const Tensor& x) override;

 private:
  DType compute_;
};

}  // namespace sparvar
