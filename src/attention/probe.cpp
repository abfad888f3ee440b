#include "attention/probe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/cs4a.h"
#include "attention/csla.h"

namespace sparvar {
namespace {

int probes_along(int size, int stride) { return (size + stride - 1) / stride; }
int probe_position(int i, int size, int stride) { return std::min(i * stride + stride / 2, size - 1); }

}  // namespace

KeyLists probe_windows(const ScaleSchedule& schedule, int k, const ProbeAttention& method, const QueryTiles& tiles) {
  CslaAttention windows;
  windows.sink_scales = std::min(method.sink_scales, k + 1);
  windows.windows.assign(k + 1, -1);
  for (int j = std::max(0, k + 1 - method.window_scales); j <= k; ++j) windows.windows[j] = method.window;
  windows.centre = CslaAttention::Centre::half_pixel;
  return csla_lists(schedule, k, windows, tiles);
}

ProbeLayout probe_layout(Grid grid, const ProbeAttention& method) {
  ProbeLayout layout;
  layout.probe_grid = {probes_along(grid.h, method.stride), probes_along(grid.w, method.stride)};
  layout.tiles = group_tiles(grid, method.group);
  std::vector<int> probe_at(grid.tokens(), -1);
  for (int i = 0; i < layout.probe_grid.h; ++i)
    for (int j = 0; j < layout.probe_grid.w; ++j) {
      const int token = probe_position(i, grid.h, method.stride) * grid.w + probe_position(j, grid.w, method.stride);
      probe_at[token] = static_cast<int>(layout.probe_rows.size());
      layout.probe_rows.push_back(token);
    }
  for (int t = 0; t < layout.tiles.count(); ++t) {
    const std::int32_t* queries = layout.tiles.rows.data() + layout.tiles.offset[t];
    const int count = layout.tiles.rows_in(t);
    const std::size_t before = layout.choosers.rows.size();
    for (int i = 0; i < count; ++i)
      if (probe_at[queries[i]] >= 0) layout.choosers.rows.push_back(probe_at[queries[i]]);
    if (layout.choosers.rows.size() == before) {
      const int middle = queries[count / 2];
      const int i = std::min(middle / grid.w / method.stride, layout.probe_grid.h - 1);
      const int j = std::min(middle % grid.w / method.stride, layout.probe_grid.w - 1);
      layout.choosers.rows.push_back(i * layout.probe_grid.w + j);
    }
    layout.choosers.offset.push_back(static_cast<std::int32_t>(layout.choosers.rows.size()));
  }
  return layout;
}

ListRecipe probe_recipe(const ScaleSchedule& schedule, int k, const ProbeAttention& method, const ProbeLayout& layout) {
  const int keys = first_keys(schedule, k).back();
  ListRecipe recipe{.tiles = layout.tiles,
                    .keys = keys,
                    .chosen = kept_keys(method.share, keys, 1),
                    .group_of = std::vector<std::int32_t>(layout.tiles.count()),
                    .map = {},
                    .fixed = probe_windows(schedule, k, method, layout.tiles)};
  std::iota(recipe.group_of.begin(), recipe.group_of.end(), 0);
  return recipe;
}

}  // namespace sparvar
