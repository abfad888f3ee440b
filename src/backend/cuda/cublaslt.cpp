#include "backend/cuda/cublaslt.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "backend/cuda/library.h"

namespace sparvar::cuda {

std::unique_ptr<CublasLt> CublasLt::load(std::string& why) {
  const std::string name = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
  void* library = open_library(name);
  if (library == nullptr) {
    why = fmt::format("{} is not installed (it comes with CUDA {})", name, CUBLAS_VER_MAJOR);
    return nullptr;
  }
  auto functions = std::make_unique<CublasLt>();
  bool complete = true;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));  // NOLINT
    if (function != nullptr) return;
    why = fmt::format("{} has no {}", name, symbol);
    complete = false;
  };
#define SPARVAR_FIND(name) find(functions->name, #name);
  SPARVAR_CUBLASLT_FUNCTIONS(SPARVAR_FIND)
#undef SPARVAR_FIND
  return complete ? std::move(functions) : nullptr;
}

}  // namespace sparvar::cuda
