// How far bf16 may take attention from what the same f32 inputs give: a bound for every number, worked out in double
// precision.
#pragma once

#include <vector>

#include "attention/key_lists.h"
#include "backend/backend.h"

namespace sparvar::conformance {

/// Half the distance of bf16 numbers above 1: the largest share that rounding to bf16 changes.
constexpr double kBf16Rounding = 1.0 / 256;

/// Of attention of f32 q [B, H, n, D] to f32 k and v [B, H, N, D], computed of numbers rounded to bf16.
struct Bf16Bounds {
  /// f32 [B, n, H, D]: |output in bf16 - output|, each tile of queries attending to its list; the output's rounding
  /// included.
  Tensor out;
  /// f32 [B * H, tiles, N]: |sum of the tile's probabilities of the key - the same|.
  Tensor sums;
};

/// With q' and k' the rounded numbers, a logit moves by at most delta = max |q' k' - q k| over the query's keys, so a
/// probability by a factor of exp(2 delta) at most. Weights, their sum and v are rounded once more; then the output.
Bf16Bounds bf16_bounds(const AttentionArgs& f32, const QueryTiles& tiles, const KeyLists& lists);

}  // namespace sparvar::conformance
