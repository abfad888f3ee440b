// CUDA status codes as errors.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "sparvar/error.h"

namespace sparvar::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(ErrorKind::system, fmt::format("CUDA: {}: {}", what, cudaGetErrorString(status)));
}

}  // namespace sparvar::cuda
