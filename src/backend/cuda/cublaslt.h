// cuBLASLt, loaded when a GPU is used.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <string>

namespace sparvar::cuda {

/// The functions of the library that are used, by their names.
struct CublasLt {
// clang-format 14 never settles on a list of macros.
// clang-format off
#define SPARVAR_CUBLASLT_FUNCTIONS(F) \
  F(cublasLtCreate) \
  F(cublasLtDestroy) \
  F(cublasLtMatmul) \
  F(cublasLtMatmulAlgoGetHeuristic) \
  F(cublasLtMatmulDescCreate) \
  F(cublasLtMatmulDescDestroy) \
  F(cublasLtMatmulDescSetAttribute) \
  F(cublasLtMatrixLayoutCreate) \
  F(cublasLtMatrixLayoutDestroy) \
  F(cublasLtMatrixLayoutSetAttribute) \
  F(cublasLtMatmulPreferenceCreate) \
  F(cublasLtMatmulPreferenceDestroy) \
  F(cublasLtMatmulPreferenceSetAttribute) \
  F(cublasLtGetVersion)
  // clang-format on
#define SPARVAR_DECLARE(name) decltype(&::name) name = nullptr;  // NOLINT(bugprone-macro-parentheses): a name
  SPARVAR_CUBLASLT_FUNCTIONS(SPARVAR_DECLARE)
#undef SPARVAR_DECLARE

  /// Null where the library is not found; `why` then says so.
  static std::unique_ptr<CublasLt> load(std::string& why);
};

}  // namespace sparvar::cuda
