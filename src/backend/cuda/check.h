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

/// While it lives this thread may allocate, copy and load kernels in the middle of a recording.
class Relaxed {
 public:
  Relaxed() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;
  ~Relaxed() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace sparvar::cuda
