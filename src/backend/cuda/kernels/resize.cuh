// Bilinear resize (align_corners = false) of token maps: what one token of the larger map takes of the smaller one.
#pragma once

#include "backend/cuda/kernels/device.cuh"
#include "sparvar/schedule.h"

namespace sparvar::cuda {

/// Source positions of one place and the weight of the higher: half-pixel centres, clamped.
struct Tap {
  int low, high;
  float weight;
  __device__ Tap(int i, int from, int to) {
    const float ratio = static_cast<float>(from) / static_cast<float>(to);
    const float centre = fmaxf((static_cast<float>(i) + 0.5F) * ratio - 0.5F, 0.0F);
    low = min(static_cast<int>(centre), from - 1);
    high = min(low + 1, from - 1);
    weight = centre - static_cast<float>(low);
  }
};

/// Four tokens of `from` and their weights.
struct Corners {
  int token[4];
  float weight[4];
  /// `place(row, column)`: where tokens of `from` lie.
  template <typename Place>
  __device__ Corners(int row, int column, Grid from, Grid to, Place place) {
    const Tap y(row, from.h, to.h);
    const Tap x(column, from.w, to.w);
    token[0] = place(y.low, x.low);
    token[1] = place(y.low, x.high);
    token[2] = place(y.high, x.low);
    token[3] = place(y.high, x.high);
    weight[3] = y.weight * x.weight;
    weight[2] = y.weight - weight[3];
    weight[1] = x.weight - weight[3];
    weight[0] = 1.0F - y.weight - weight[1];
  }
};

/// Everywhere in this order, so that results agree in every bit.
__device__ inline float plus_corners(float x, const float (&weight)[4], float a, float b, float c, float d) {
  return fmaf(weight[3], d, fmaf(weight[2], c, fmaf(weight[1], b, fmaf(weight[0], a, x))));
}

}  // namespace sparvar::cuda
