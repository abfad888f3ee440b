// The CUDA device: cuBLASLt for matrix products, cuDNN for convolutions and large dense attention, own kernels for the
// rest. Operations are enqueued on one stream; a program is a CUDA graph recorded from it.
// Each group of operations has a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <optional>

#include "backend/backend.h"
#include "backend/cuda/cudnn.h"
#include "backend/cuda/gemm.h"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/pool.h"
#include "backend/cuda/uploader.h"
#include "core/e4m3.h"

namespace sparvar::cuda {

/// Libraries and facts of one GPU.
struct Gpu {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;
  int multiprocessors = 1;
  std::int64_t free_bytes = 0, total_bytes = 0;
};

class CudaLinear final : public Linear {
 public:
  Tensor weight;     // [out, in], f32, bf16 or e4m3
  Tensor bias_f32;   // [out], as wide as the result it is added to; undefined: none
  Tensor bias_bf16;  // only where the weight is not f32
};

/// Throws Error(usage) where q, k, v and the number of keys do not fit each other.
void check_args(const AttentionArgs& args, int keys);
/// Are keys of so few queries shared out to parts (attend_in_parts)?
bool shares_out_keys(const AttentionArgs& args, int keys);
/// Heads of other sizes are taken through f32.
constexpr bool fits_tensor_cores(std::int64_t dim) { return dim % 8 == 0 && dim <= 128; }

/// Tiles of queries on the device as a kernel of attention to lists takes them (TileRows, kernels/kernels.h).
struct Pieces {
  Tensor tiles;
  int count = 0;
  int whole = 0;         // the first so many have most_queries
  int most_queries = 0;  // of a tile
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const CudaOptions& options, Gpu gpu, std::unique_ptr<CublasLt> cublas);
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;
  ~CudaBackend() override;
  DType compute_type() const override { return compute_; }
  std::string describe() const override;

  // running.cpp
  bool records() const override { return true; }
  ProgramPtr program(std::function<void()> body) override;
  MarkPtr mark() override;
  void reserve(const std::function<void()>& bodies) override;
  MemoryUse memory_use() const override;
  int recordings() const override { return recordings_; }
  std::int64_t working_bytes(const std::function<void()>& body) override;
  void run_on(void* stream, void* memory, std::int64_t bytes, const std::function<void()>& body) override;
  std::vector<ProductTime> product_times() const override;
  int length_step() const override { return 64; }
  DType product_type() const override { return compute_; }

  // tensors.cpp
  Tensor empty(DType dtype, Shape shape) override;
  Tensor zeros(DType dtype, Shape shape) override;
  Tensor random(DType dtype, Shape shape, std::uint64_t seed, float deviation) override;
  Tensor upload(const Tensor& host) override;
  Tensor download(const Tensor& tensor) override;
  void write(Tensor& to, const Tensor& from) override;
  void fill_zero(Tensor& x) override;
  Tensor clone(const Tensor& x) override;
  Tensor repeat(const Tensor& x, int times) override;

  // dense.cpp
  LinearPtr prepare_linear(const Tensor& weight, const Tensor& bias, LinearKind kind) override;
  Tensor linear(const Tensor& x, const Linear& weights, Activation activation, DType out) override;
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
  void subtract(const Tensor& a, const Tensor& b, Tensor& out) override;
  Tensor gated_gelu(const Tensor& a, const Tensor& b) override;

  // attention.cpp and lists.cpp
  void split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) override;
  Tensor grown(const Tensor& cache, std::int64_t more) override;
  void dense_attention(AttentionArgs& args, int keys) override;
  void attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) override;
  AttentionListsPtr prepare_lists(const QueryTiles& tiles, const KeyLists& lists) override;
  void attention(AttentionArgs& args, const AttentionLists& lists) override;
  AttentionRecipePtr prepare_recipe(const ListRecipe& recipe) override;
  void attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) override;
  void attention_with_residual(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs,
                               const Tensor& cache, const TokenMap& from, const TokenMap& to) override;
  void select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) override;
  void attend_and_choose(AttentionArgs& args, const std::vector<std::int32_t>& rows, const QueryTiles& groups, int keys,
                         const std::vector<int>& counts, Tensor& choice) override;
  Tensor minus_rows(const Tensor& x, const Tensor& of, const std::vector<std::int32_t>& rows) override;
  Tensor column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) override;
  void add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) override;
  Tensor gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) override;
  Tensor gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) override;
  Tensor cross_attention(const Tensor& q, const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest, float scale,
                         bool settled) override;
  Tensor biased_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                          const Tensor& length) override;

  // folded_text.cpp
  std::int64_t folded_rows(const Linear& query, const Linear& out, int heads, std::int64_t texts,
                           std::int64_t longest) const override;
  FoldedText fold_text(const Tensor& kv, const Tensor& cu_lengths, std::int64_t longest, const Linear& query,
                       const Linear& out) override;
  Tensor folded_cross_attention(const Tensor& x, const FoldedText& text, const Tensor& cu_lengths, int heads,
                                const Linear& projection, float scale, DType out) override;

  // feature_map.cpp
  ConvolutionPtr prepare_convolution(const Tensor& weight_oihw, const Tensor& bias, int stride, int pad_begin,
                                     int pad_end) override;
  Tensor convolution(const Tensor& x, const Convolution& weights, const Tensor& residual) override;
  Tensor upsample_nearest_2x(const Tensor& x) override;
  Tensor upsampled_convolution(const Tensor& x, const Convolution& weights) override;
  Tensor group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                    bool silu) override;
  Tensor to_nhwc(const Tensor& x) override;
  Tensor to_nchw(const Tensor& x, float limit) override;
  Tensor to_bytes(const Tensor& x) override;

 private:
  friend class CudaProgram;
  /// Is work enqueued (and not only planned)?
  bool computes() const { return !dry_; }
  /// For work outside of programs: reserve() has waited for theirs.
  void weights_are_there() {
    if (computes() && !recording_) uploader_.finish();
  }
  Tensor weight_memory(DType dtype, Shape shape);
  Tensor loaded(const Tensor& from, DType type);
  Tensor loaded_e4m3(const Tensor& from);
  void attend_in_f32(AttentionArgs& args, Tensor out, const std::function<void(AttentionArgs&)>& attend);
  void follow_recipe(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs,
                     const ResizedResidual& residual);
  struct Parts;
  const Parts& parts_of(int queries, int keys, int parts, int per_tile);
  void attend_parts(const AttentionArgs& args, int queries, int keys, int parts, int per_tile,
                    const LogitRows& logits = {}, const Tensor& rows = {});
  void attend_in_parts(AttentionArgs& args, int keys, const LogitRows& logits = {}, const Tensor& rows = {});
  /// Queries of a tile with which attend_parts is fastest; 0 where it cannot do it.
  int tile_for_all_keys(const AttentionArgs& args, int keys) const;
  Tensor kept(const void* values, DType type, std::int64_t count);
  Tensor kept_rows(const std::vector<std::int32_t>& rows);
  Tensor converted(const Tensor& x, DType type);
  Tensor quantised(const Tensor& x, bool gelu);
  /// `like`: a weight to measure algorithms with.
  void multiply(const GemmShape& product, const Operand& x, const Operand& weight, const Tensor& bias, Tensor& y,
                const Tensor& like);
  Tensor convolve(const Tensor& x, const Convolution& weights, const Tensor& residual, bool enlarged);
  bool convolve_with_cudnn(const OwnConvolution& args, const Tensor& x);
  Cudnn* cudnn();  // null where it cannot be loaded
  void* workspace() const { return workspace_.get(); }
  void select_device() const;
  std::shared_ptr<Pool> planned(const std::function<void()>& bodies);

  DType compute_;
  bool fp8_;
  Gpu gpu_;
  bool planning_;
  bool hopper_;
  CudaOptions::Older older_;
  bool dry_ = false;
  bool recording_ = false;
  int recordings_ = 0;
  std::unique_ptr<CublasLt> cublas_;
  cudaStream_t stream_ = nullptr;
  std::shared_ptr<Pool> weights_;
  std::shared_ptr<Pool> working_;
  std::shared_ptr<void> workspace_;  // of cuBLASLt
  std::int64_t planned_working_ = 0;
  /// What attention in parts needs, by queries, keys, parts and queries of a tile.
  struct Parts {
    Pieces pieces;
    Tensor ranges, rows, keys;
  };
  std::map<std::array<int, 4>, Parts> parts_;
  std::map<std::vector<std::int32_t>, Tensor> kept_rows_;
  Uploader uploader_;
  std::unique_ptr<Gemms> gemms_;
  std::unique_ptr<Cudnn> cudnn_;
  std::string why_no_cudnn_;
};

}  // namespace sparvar::cuda
