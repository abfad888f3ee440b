// What the kernels share: reading and writing f32 and bf16, sums over a warp or a block, checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/tensor.h"
#include "sparvar/error.h"

namespace sparvar::cuda {

using bf16 = __nv_bfloat16;

__device__ inline float read(float x) { return x; }
__device__ inline float read(bf16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T rounded(float x) {
  if constexpr (sizeof(T) == 2)
    return __float2bfloat16_rn(x);
  else
    return x;
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffU, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, step));
  return x;
}

/// Throws where the launch before it was refused.
inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    throw Error(ErrorKind::system, std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
}

/// Calls f with a value of the element type.
template <typename F>
void with_type(DType type, F f) {
  if (type == DType::f32)
    f(float{});
  else
    f(bf16{});
}

inline unsigned blocks_for(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace sparvar::cuda
