// What the kernels for column sums share: weights of keys by queries, summed over a thread's own columns.
#pragma once

#include "backend/cuda/kernels/attention_tile.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {

static_assert(ColumnStage::kQueries == kKeys);

/// Sums of one group so far, of keys lane / 4 and lane / 4 + 8 of a warp's 16.
struct GroupSums {
  float of[2] = {0, 0};

  __device__ void write(const ColumnSums& a, int index, int group, int key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = of[half];
      x += __shfl_xor_sync(0xffffffffU, x, 1);
      x += __shfl_xor_sync(0xffffffffU, x, 2);
      const int at = key + lane / 4 + 8 * half;
      if (lane % 4 == 0 && at < a.keys) a.sums[(std::int64_t{index} * a.groups + group) * a.keys + at] = x;
      of[half] = 0;
    }
  }
};

/// Logits become weights, summed or written as the stage says. `lessening`: of the stage's queries, infinite where
/// there is none; in shared memory. `key`: the first of the warp's.
__device__ inline void sum_stage(const ColumnSums& a, GroupSums& sums, float (&s)[kKeys / 8][4], const float* lessening,
                                 const ColumnStage& stage, const std::int32_t* group_of, int index, int key) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = a.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const float2 less = *reinterpret_cast<const float2*>(lessening + n * 8 + lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = power_of_two(fmaf(s[n][j], scale, j % 2 == 0 ? -less.x : -less.y));
  }
  if (stage.kind <= ColumnStage::last_part) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int half = 0; half < 2; ++half) sums.of[half] += s[n][2 * half] + s[n][2 * half + 1];
    if (stage.kind == ColumnStage::last_part) sums.write(a, index, stage.group, key);
    return;
  }
  if (stage.kind == ColumnStage::single) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j % 2;
        const int at = key + lane / 4 + j / 2 * 8;
        if (column < stage.count && at < a.keys)
          a.sums[(std::int64_t{index} * a.groups + __ldg(group_of + column)) * a.keys + at] = s[n][j];
      }
    return;
  }
  for (int begin = 0; begin < stage.count;) {
    const int group = __ldg(group_of + begin);
    int end = begin + 1;
    while (end < stage.count && __ldg(group_of + end) == group) ++end;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j % 2;
        sums.of[j / 2] += column >= begin && column < end ? s[n][j] : 0.0F;
      }
    sums.write(a, index, group, key);
    begin = end;
  }
}

}  // namespace sparvar::cuda
