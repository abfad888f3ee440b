#include "attention/cs4a.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "attention/csla.h"
#include "core/parallel.h"

namespace sparvar {

int kept_keys(double share, int keys, int granularity) {
  const int steps = std::max(1, static_cast<int>(std::nearbyint(share * keys / granularity)));
  return static_cast<int>(std::min<std::int64_t>(static_cast<std::int64_t>(steps) * granularity, keys));
}

namespace {

/// Unsigned numbers in the order of the floats; NaN below everything.
std::uint32_t ordered(float x) {
  if (std::isnan(x)) return 0;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

/// The count-th largest of values, found digit by digit (8 bits each): one pass over the keys a digit.
struct Threshold {
  std::uint32_t value;
  int above;  // how many are larger
};

Threshold threshold_of(const std::vector<std::uint32_t>& values, int count) {
  std::uint32_t prefix = 0;
  std::uint32_t mask = 0;
  int above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int histogram[256] = {};
    for (const std::uint32_t v : values)
      if ((v & mask) == prefix) ++histogram[(v >> shift) & 255U];
    int digit = 255;
    while (digit > 0 && above + histogram[digit] < count) above += histogram[digit--];
    prefix |= static_cast<std::uint32_t>(digit) << shift;
    mask |= 255U << shift;
  }
  return {prefix, above};
}

}  // namespace

void select_top(const float* sums, int keys, int count, std::int32_t* out) {
  thread_local std::vector<std::uint32_t> values;
  values.resize(static_cast<std::size_t>(keys));
  for (int i = 0; i < keys; ++i) values[i] = ordered(sums[i]);
  const Threshold threshold = threshold_of(values, count);
  int ties = count - threshold.above;
  for (int i = 0; i < keys; ++i) {
    if (values[i] > threshold.value || (values[i] == threshold.value && ties-- > 0)) *out++ = i;
  }
}

Selection select_keys(const float* column_sums, int lists, int groups, int keys, int count) {
  Selection selection{lists, groups, count, {}};
  const std::int64_t all = static_cast<std::int64_t>(lists) * groups;
  selection.keys.resize(static_cast<std::size_t>(all * count));
  parallel_for(all, [&](std::int64_t i) {
    const float* sums = column_sums + i * keys;
    std::int32_t* chosen = selection.keys.data() + i * count;
    select_top(sums, keys, count, chosen);
    std::stable_sort(chosen, chosen + count,
                     [sums](std::int32_t a, std::int32_t b) { return ordered(sums[a]) > ordered(sums[b]); });
  });
  return selection;
}

int group_of_decision(int group, int groups, int decision_groups) {
  const float place =
      (static_cast<float>(group) + 0.5F) / static_cast<float>(groups) * static_cast<float>(decision_groups) - 0.5F;
  return std::clamp(static_cast<int>(std::nearbyint(place)), 0, decision_groups - 1);
}

std::vector<int> tiles_of_decision(Grid grid, Grid decision, const QueryGroup& group) {
  std::vector<int> out;
  const int across = (decision.w + group.tile_w - 1) / group.tile_w;
  for (int top = 0; top < grid.h; top += group.tile_h)
    for (int left = 0; left < grid.w; left += group.tile_w) {
      const int bottom = std::min(top + group.tile_h, grid.h);
      const int right = std::min(left + group.tile_w, grid.w);
      const int y = (top + bottom) * decision.h / (2 * grid.h);
      const int x = (left + right) * decision.w / (2 * grid.w);
      out.push_back(std::min(y, decision.h - 1) / group.tile_h * across + std::min(x, decision.w - 1) / group.tile_w);
    }
  return out;
}

namespace {

/// Bounds of a window x window neighbourhood on the scale's own grid, along one axis.
std::vector<Bounds> own_bounds(int size, int window) {
  std::vector<Bounds> out;
  out.reserve(size);
  for (int i = 0; i < size; ++i) out.push_back(window_bounds(i, size, size, window, CslaAttention::Centre::half_pixel));
  return out;
}

}  // namespace

std::vector<KeyRun> local_runs(Grid grid, int first_key, int window, const QueryTiles& groups, int granularity) {
  const std::vector<Bounds> rows = own_bounds(grid.h, window);
  const std::vector<Bounds> columns = own_bounds(grid.w, window);
  KeySet set(grid.tokens());
  KeyLists unions;
  unions.tiles = groups.count();
  std::int64_t longest = 0;
  for (int g = 0; g < groups.count(); ++g) {
    add_windows(set, groups.rows.data() + groups.offset[g], groups.rows_in(g), grid, rows, columns, grid, 0);
    set.flush(unions);
    longest = std::max(longest, unions.keys_in(0, g));
  }
  const int length = std::min(static_cast<int>((longest + granularity - 1) / granularity * granularity), grid.tokens());
  std::vector<KeyRun> out;
  for (int g = 0; g < groups.count(); ++g) {
    const std::int64_t r = unions.offset[g];
    const int begin = r < unions.offset[g + 1] ? unions.runs[r].begin : 0;
    out.push_back({first_key + std::min(begin, grid.tokens() - length), length});
  }
  return out;
}

std::int32_t carry_by_ratio(std::int32_t key, std::int64_t keys_k, std::int64_t keys_s) {
  return static_cast<std::int32_t>(keys_k * key / keys_s);
}

std::int32_t carry_by_grid(std::int32_t key, const ScaleSchedule& schedule, int k, int decision_scale) {
  int j = 0;
  int first = 0;
  while (key >= first + schedule[j].tokens()) first += schedule[j++].tokens();
  const int row = (key - first) / schedule[j].w;
  const int column = (key - first) % schedule[j].w;
  const int target = k - (decision_scale - j);
  int target_first = 0;
  for (int i = 0; i < target; ++i) target_first += schedule[i].tokens();
  const Grid from = schedule[j];
  const Grid to = schedule[target];
  return target_first + row * to.h / from.h * to.w + column * to.w / from.w;
}

namespace {

int own_window(const Cs4aAttention& method, int k) {
  const int i = k - method.decision_scale - 1;
  if (method.own_windows.empty() || i < 0) return 0;
  return method.own_windows[std::min<std::size_t>(i, method.own_windows.size() - 1)];
}

/// What the lists of one scale are made of, whatever the (batch, head).
struct Carried {
  std::vector<int> group_of;               // decision-scale group of each tile
  std::vector<std::vector<KeyRun>> local;  // per tile: runs that every list gets
};

/// Row-ordered groups as published: the lists of scale k - 1, local part included, are the template of scale k.
Carried carried_rows_template(const Cs4aAttention& method, const ScaleSchedule& schedule, int k,
                              const std::vector<int>& first) {
  Carried below;
  for (int g = 0; g < row_tiles(schedule[method.decision_scale].tokens(), method.group.rows).count(); ++g)
    below.group_of.push_back(g);
  below.local.resize(below.group_of.size());
  for (int scale = method.decision_scale + 1; scale <= k; ++scale) {
    const QueryTiles groups = row_tiles(schedule[scale].tokens(), method.group.rows);
    std::vector<KeyRun> own;
    if (const int window = own_window(method, scale); window > 0)
      own = local_runs(schedule[scale], first[scale], window, groups, method.granularity);
    Carried here;
    for (int g = 0; g < groups.count(); ++g) {
      const int source = group_of_decision(g, groups.count(), static_cast<int>(below.group_of.size()));
      here.group_of.push_back(below.group_of[source]);
      here.local.push_back(below.local[source]);
      if (!own.empty()) here.local.back().push_back(own[g]);
    }
    below = std::move(here);
  }
  return below;
}

Carried carried_rows(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const std::vector<int>& first,
                     const QueryTiles& tiles, int decision_groups) {
  Carried out;
  out.local.resize(tiles.count());
  for (int t = 0; t < tiles.count(); ++t) out.group_of.push_back(group_of_decision(t, tiles.count(), decision_groups));
  if (const int window = own_window(method, k); window > 0) {
    const std::vector<KeyRun> own = local_runs(schedule[k], first[k], window, tiles, method.granularity);
    for (int t = 0; t < tiles.count(); ++t) out.local[t] = {own[t]};
  }
  return out;
}

Carried carried_tiles(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const std::vector<int>& first,
                      const QueryTiles& tiles) {
  const Grid grid = schedule[k];
  Carried out{tiles_of_decision(grid, schedule[method.decision_scale], method.group), {}};
  out.local.resize(tiles.count());
  const int window = own_window(method, k);
  if (window < 1) return out;
  const std::vector<Bounds> rows = own_bounds(grid.h, window);
  const std::vector<Bounds> columns = own_bounds(grid.w, window);
  KeySet set(first[k + 1]);
  KeyLists windows;
  for (int t = 0; t < tiles.count(); ++t) {
    add_windows(set, tiles.rows.data() + tiles.offset[t], tiles.rows_in(t), grid, rows, columns, grid, first[k]);
    set.flush(windows);
    out.local[t].assign(windows.runs.begin() + windows.offset[t], windows.runs.end());
  }
  return out;
}

/// Keys that give way to the sinks, which no key maps to at scale k.
int sinks_in_front(const Cs4aAttention& method, const std::vector<int>& first, int k, int count) {
  return method.carry == Cs4aAttention::Carry::grid ? std::min(first[k - method.decision_scale], count) : 0;
}

}  // namespace

std::vector<int> counts_to_choose(const Cs4aAttention& method, const ScaleSchedule& schedule) {
  const int last = static_cast<int>(schedule.size()) - 1;
  const std::vector<int> first = first_keys(schedule, last);
  const int count = kept_keys(method.share, first[method.decision_scale + 1], method.granularity);
  std::vector<int> out{count};
  for (int k = method.decision_scale + 1; k <= last; ++k) {
    const int left = count - sinks_in_front(method, first, k, count);
    if (left < out.back() && left > 0) out.push_back(left);
  }
  return out;
}

ListRecipe carry_recipe(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const QueryTiles& tiles,
                        int decision_groups, int count) {
  const std::vector<int> first = first_keys(schedule, k);
  Carried carried;
  if (method.group.rows == 0)
    carried = carried_tiles(method, schedule, k, first, tiles);
  else if (method.carry == Cs4aAttention::Carry::group)
    carried = carried_rows_template(method, schedule, k, first);
  else
    carried = carried_rows(method, schedule, k, first, tiles, decision_groups);

  const int front = sinks_in_front(method, first, k, count);
  ListRecipe recipe{.tiles = tiles,
                    .keys = first.back(),
                    .chosen = count - front,
                    .group_of = {carried.group_of.begin(), carried.group_of.end()},
                    .map = {},
                    .fixed = {}};
  recipe.fixed = build_lists(1, tiles.count(), first.back(), [&](int, int tile, KeySet& set) {
    set.add(0, front);
    for (const KeyRun& run : carried.local[tile]) set.add(run.begin, run.count);
  });
  if (method.carry == Cs4aAttention::Carry::group) return recipe;
  const int decided = first[method.decision_scale + 1];
  for (int key = 0; key < decided; ++key)
    recipe.map.push_back(method.carry == Cs4aAttention::Carry::ratio
                             ? carry_by_ratio(key, first[k + 1], decided)
                             : carry_by_grid(key, schedule, k, method.decision_scale));
  return recipe;
}

KeyLists carry_keys(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const QueryTiles& tiles,
                    const Selection& selection) {
  const ListRecipe recipe = carry_recipe(method, schedule, k, tiles, selection.groups, selection.count);
  return follow(recipe, selection.keys.data(), selection.lists, selection.groups, selection.count);
}

}  // namespace sparvar
