// y = act(x W^T + b) through cuBLASLt: one problem per shape, the algorithm measured where the product is large.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cublaslt.h"

namespace sparvar::cuda {

/// Numbers of a matrix; of e4m3 with an f32 factor for every row.
struct Operand {
  const void* values = nullptr;
  const float* scales = nullptr;
  bool operator==(const Operand&) const = default;
};

/// x [rows, in] of `type`, W [out, in] of `type`, bias [out] of result's type or null, y [rows, out]. Of e4m3, `in` and
/// `out` are multiples of 16 and the result is bf16. Of a batch every product has an x, W and y, packed one behind the
/// other but where w_row and w_batch say how far rows and matrices of W lie apart, and all have the same bias.
struct GemmShape {
  std::int64_t rows = 0, in = 0, out = 0;
  DType type = DType::bf16;
  DType result = DType::bf16;
  bool bias = false;
  bool gelu = false;    // tanh form
  bool turned = false;  // W is [in, out]
  std::int64_t batch = 1;
  std::int64_t w_row = 0, w_batch = 0;  // in numbers; 0: packed
  auto key() const { return std::tuple(rows, in, out, type, result, bias, gelu, turned, batch, w_row, w_batch); }
  std::int64_t x_size() const { return batch * rows * in; }
  std::int64_t y_size() const { return batch * rows * out; }
  bool is_plain() const { return !turned && batch == 1 && w_row == 0; }
  bool operator<(const GemmShape& other) const { return key() < other.key(); }
};

class Gemms {
 public:
  /// `choices`: where the algorithms of large products are kept, under `machine`; without it they give the bits of the
  /// library's favourite.
  Gemms(const CublasLt& library, cudaStream_t stream, std::shared_ptr<ProductChoices> choices = {},
        const std::string& machine = {});
  Gemms(const Gemms&) = delete;
  Gemms& operator=(const Gemms&) = delete;
  ~Gemms();

  static constexpr std::size_t kWorkspaceBytes = 32U << 20;
  /// Can products of e4m3 numbers with a factor for every row be had? Empty, or why not in one line.
  static std::string why_no_e4m3(const CublasLt& library);
  /// Looks the algorithms up. `weight` is one of the weights that will be multiplied so; large products remember a few
  /// for tune().
  void prepare(const GemmShape& shape, const Operand& weight);
  /// Does cuBLASLt have the epilogue for this shape?
  bool supports(const GemmShape& shape);
  /// Measures the candidates of every large product that was prepared since, on random inputs in `scratch`.
  void tune(void* scratch, std::size_t scratch_bytes, void* workspace);
  std::size_t scratch_wanted() const;
  std::vector<ProductTime> times() const;  // of the products that tune() measured
  /// `settled`: weight and bias were there before the program that is recorded.
  void run(const GemmShape& shape, const Operand& x, const Operand& weight, const void* bias, void* y, void* workspace,
           bool settled = false);

 private:
  struct Problem;
  Problem& problem(const GemmShape& shape);
  void describe(const GemmShape& shape, Problem& made);
  void find_candidates(const GemmShape& shape, Problem& made);
  void measure(const GemmShape& shape, Problem& problem, char* scratch, void* workspace);
  bool follow(Problem& problem, const ProductChoices::Choice& choice) const;
  bool launch(const Problem& problem, int candidate, const Operand& x, const Operand& weight, void* y, void* workspace);

  const CublasLt& library_;
  cudaStream_t stream_;
  std::shared_ptr<ProductChoices> choices_;
  std::string machine_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<GemmShape, std::unique_ptr<Problem>> problems_;
};

}  // namespace sparvar::cuda
