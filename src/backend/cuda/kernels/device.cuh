// What the kernels share: reading and writing f32 and bf16, sums over a warp or a block, checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <set>
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

/// Unsigned numbers in the order of the floats, below 0xffffffff; NaN is 0.
__device__ inline unsigned ordered(float x) {
  if (x != x) return 0;
  const unsigned bits = __float_as_uint(x);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffU, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, step));
  return x;
}

/// `of_warp` (warp_sum, warp_max of values that are not negative) over the threads of one row, blockDim.x of them, a
/// multiple of 32; `parts` [32] is not shared between two calls of a kernel.
template <typename OfWarp>
__device__ inline float over_row(float x, float* parts, OfWarp of_warp) {
  x = of_warp(x);
  if (blockDim.x == 32) return x;
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return of_warp(lane < blockDim.x / 32 ? parts[lane] : 0.0F);
}
__device__ inline float row_sum(float x, float* parts) {
  return over_row(x, parts, [](float part) { return warp_sum(part); });
}
__device__ inline float row_max(float x, float* parts) {
  return over_row(x, parts, [](float part) { return warp_max(part); });
}

/// Throws where the launch before it was refused.
inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    throw Error(ErrorKind::system, std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
}

// Kernels may start before the one that was launched before them has ended (sm_90, programmatic dependent launch): such
// a kernel begins with both calls, or puts what depends on nobody before the wait.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
/// Until every launch before this one has ended and its writes are seen.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// On Hopper alone: what is newer runs the code for compute_80, which does not wait.
inline bool launches_overlap() {
  static const bool hopper = [] {
    int device = 0;
    int major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
  }();
  return hopper;
}

inline int multiprocessors() {
  static const int count = [] {
    int device = 0;
    int value = 132;
    if (cudaGetDevice(&device) == cudaSuccess)
      (void)cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value;
  }();
  return count;
}

/// A kernel that uses little shared memory beside one that uses much: all of them must divide the multiprocessor's
/// memory alike, or the one waits until the other has left.
template <typename Kernel>
void share_multiprocessors(Kernel kernel) {
  (void)cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

/// kernel<<<grid, block, shared, stream>>>(args...) that may start early, in clusters of `cluster` blocks.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
                  unsigned cluster, const Arguments&... args) {
  static std::set<const void*> shares;  // per signature
  if (shares.insert(reinterpret_cast<const void*>(kernel)).second) share_multiprocessors(kernel);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (launches_overlap()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  (void)cudaLaunchKernelEx(&config, kernel, args...);  // a refusal shows in check_launch
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
