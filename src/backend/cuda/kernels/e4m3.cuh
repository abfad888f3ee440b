// 8-bit floats with a scale for every row: what the kernels that make them share. An e4m3 number has a sign, 4 bits of
// exponent and 3 of fraction; its largest is 448, it has a NaN and no infinity.
#pragma once

#include <cuda_fp8.h>

#include "backend/cuda/kernels/device.cuh"

namespace sparvar::cuda {

struct E4m3 {
  std::uint8_t bits;
};

/// Of a row whose largest magnitude is `largest`. Never so small that its inverse overflows.
__device__ inline float e4m3_scale(float largest) { return fmaxf(largest / 448.0F, 0x1p-120F); }

// Rounded to nearest even; beyond the largest number comes the largest number.
__device__ inline E4m3 one_e4m3(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }
__device__ inline unsigned four_e4m3(float a, float b, float c, float d) {
  const unsigned low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const unsigned high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | (high << 16);
}

}  // namespace sparvar::cuda
