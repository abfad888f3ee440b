// CSLA: static lists of the keys that windows and sink scales show to each tile of queries (method: SparVAR, CSLA).
#pragma once

#include <cstdint>
#include <vector>

#include "attention/key_lists.h"
#include "sparvar/attention_plan.h"

namespace sparvar {

/// Positions [begin, end) along one axis; empty where nothing is seen.
struct Bounds {
  int begin = 0;
  int end = 0;
  bool operator==(const Bounds&) const = default;
};

/// The published windows belong to 13 scales; with another number the last ones stay with the last scales.
CslaAttention published_csla(int scales, CslaAttention::Form form);

/// What a query at `position` of `size` sees of a key axis of `key_size` through a window of side `window` (radius
/// floor(window / 2); a negative radius sees nothing).
Bounds window_bounds(int position, int size, int key_size, int window, CslaAttention::Centre centre);

/// Bounds of every position of one axis of scale k at key scale j: sink scales whole, windows elsewhere.
/// `rows`: the vertical axis.
std::vector<Bounds> axis_bounds(const ScaleSchedule& schedule, int k, int j, const CslaAttention& method, bool rows);

/// The first key of each scale 0 .. k, and one past the last.
std::vector<int> first_keys(const ScaleSchedule& schedule, int k);

/// Tiles of the method's group; Form::blocks: `block` queries in row order.
QueryTiles csla_tiles(Grid grid, const CslaAttention& method);
/// Per tile the union of its queries' visible keys; Form::blocks: whole blocks with any visible pair.
KeyLists csla_lists(const ScaleSchedule& schedule, int k, const CslaAttention& method, const QueryTiles& tiles);

/// Adds the union over `count` queries (token indices of `grid`) of the w x w windows they see of a key scale.
void add_windows(KeySet& set, const std::int32_t* queries, int count, Grid grid, const std::vector<Bounds>& rows,
                 const std::vector<Bounds>& columns, Grid keys, int first_key);

}  // namespace sparvar
