#include "attention/csla.h"

#include <algorithm>
#include <cmath>

namespace sparvar {
namespace {

int centre_of(int position, int size, int key_size, CslaAttention::Centre centre) {
  if (centre == CslaAttention::Centre::half_pixel)
    return static_cast<int>((2LL * position + 1) * key_size / (2LL * size));
  // The authors' float32 operations in their order, rounded half to even; may be key_size, outside the grid.
  const float share = static_cast<float>(position) / static_cast<float>(size);
  return static_cast<int>(std::nearbyint(share * static_cast<float>(key_size)));
}

/// Visible keys of a tile's queries, rounded up to whole blocks.
void add_blocks(KeySet& set, const KeyLists& exact, int tile, int block) {
  for (std::int64_t r = exact.offset[tile]; r < exact.offset[tile + 1]; ++r) {
    const int first = exact.runs[r].begin / block;
    const int last = (exact.runs[r].begin + exact.runs[r].count - 1) / block;
    set.add(first * block, (last - first + 1) * block);
  }
}

}  // namespace

CslaAttention published_csla(int scales, CslaAttention::Form form) {
  CslaAttention csla;
  csla.form = form;
  const int published = static_cast<int>(csla.windows.size());
  if (scales < published) csla.windows.erase(csla.windows.begin(), csla.windows.begin() + (published - scales));
  if (scales > published) csla.windows.insert(csla.windows.begin(), scales - published, -1);
  return csla;
}

Bounds window_bounds(int position, int size, int key_size, int window, CslaAttention::Centre centre) {
  if (window < 1) return {};
  const int radius = window / 2;
  const int middle = centre_of(position, size, key_size, centre);
  const Bounds bounds{std::max(middle - radius, 0), std::min(middle + radius + 1, key_size)};
  return bounds.begin < bounds.end ? bounds : Bounds{};
}

std::vector<Bounds> axis_bounds(const ScaleSchedule& schedule, int k, int j, const CslaAttention& method, bool rows) {
  const int size = rows ? schedule[k].h : schedule[k].w;
  const int key_size = rows ? schedule[j].h : schedule[j].w;
  const int window = j < static_cast<int>(method.windows.size()) ? method.windows[j] : -1;
  std::vector<Bounds> bounds;
  bounds.reserve(size);
  for (int position = 0; position < size; ++position)
    bounds.push_back(j < method.sink_scales ? Bounds{0, key_size}
                                            : window_bounds(position, size, key_size, window, method.centre));
  return bounds;
}

std::vector<int> first_keys(const ScaleSchedule& schedule, int k) {
  std::vector<int> first{0};
  for (int j = 0; j <= k; ++j) first.push_back(first.back() + schedule[j].tokens());
  return first;
}

QueryTiles csla_tiles(Grid grid, const CslaAttention& method) {
  return method.form == CslaAttention::Form::blocks ? row_tiles(grid.tokens(), method.block)
                                                    : group_tiles(grid, method.group);
}

void add_windows(KeySet& set, const std::int32_t* queries, int count, Grid grid, const std::vector<Bounds>& rows,
                 const std::vector<Bounds>& columns, Grid keys, int first_key) {
  // Per key row the columns seen: one interval a query row of the tile, merged by the set.
  for (int i = 0; i < count;) {
    // Consecutive queries of one grid row see the same key rows.
    const int y = queries[i] / grid.w;
    int end = i;
    while (end < count && queries[end] / grid.w == y && queries[end] == queries[i] + (end - i)) ++end;
    for (int v = rows[y].begin; v < rows[y].end; ++v) {
      int from = 0, to = 0;
      for (int q = i; q < end; ++q) {
        const Bounds& b = columns[queries[q] % grid.w];
        if (b.begin == b.end) continue;
        if (b.begin > to || from == to) {
          set.add(first_key + v * keys.w + from, to - from);
          from = b.begin;
        }
        to = std::max(to, b.end);
      }
      set.add(first_key + v * keys.w + from, to - from);
    }
    i = end;
  }
}

KeyLists csla_lists(const ScaleSchedule& schedule, int k, const CslaAttention& method, const QueryTiles& tiles) {
  const std::vector<int> first = first_keys(schedule, k);
  KeyLists lists;
  lists.tiles = tiles.count();
  KeySet set(first.back());
  std::vector<std::vector<Bounds>> rows, columns;
  for (int j = 0; j <= k; ++j) {
    rows.push_back(axis_bounds(schedule, k, j, method, true));
    columns.push_back(axis_bounds(schedule, k, j, method, false));
  }
  for (int t = 0; t < tiles.count(); ++t) {
    for (int j = 0; j <= k; ++j)
      add_windows(set, tiles.rows.data() + tiles.offset[t], tiles.rows_in(t), schedule[k], rows[j], columns[j],
                  schedule[j], first[j]);
    set.flush(lists);
  }
  if (method.form == CslaAttention::Form::lists) return lists;
  KeyLists blocks;
  blocks.tiles = tiles.count();
  for (int t = 0; t < tiles.count(); ++t) {
    add_blocks(set, lists, t, method.block);
    set.flush(blocks);
  }
  return blocks;
}

}  // namespace sparvar
