// Pruned scales: which tokens run, and what stands for those that do not (after FastVAR: keep what differs most from
// the map's mean, fill the rest from a cached scale). Tensors are on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// Indices, ascending, of the `count` rows of x f32 [1 or more, n, C] (its first entry) that are farthest from the mean
/// row; of equal ones the first.
std::vector<std::int32_t> farthest_rows(const Tensor& x, int count);

/// Rows `rows` of every entry of x f32 [B, n, C]: [B, rows, C].
Tensor rows_taken(const Tensor& x, const std::vector<std::int32_t>& rows);

/// x [B, n, C] with its rows `rows` replaced by those of `from` [B, rows, C].
void put_rows(Tensor& x, const std::vector<std::int32_t>& rows, const Tensor& from);

}  // namespace sparvar
