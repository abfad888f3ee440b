#include "attention/survey.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "attention/probe.h"

namespace sparvar {
namespace {

int keys_of(const ScaleSchedule& schedule, int k) { return first_keys(schedule, k).back(); }

Mask dense_mask(const ScaleSchedule& schedule, int k) {
  const QueryTiles tiles = row_tiles(schedule[k].tokens(), schedule[k].tokens());
  return {tiles, all_keys(tiles, keys_of(schedule, k))};
}

Mask csla_mask(const CslaAttention& method, const ScaleSchedule& schedule, int k) {
  const QueryTiles tiles = csla_tiles(schedule[k], method);
  return {tiles, csla_lists(schedule, k, method, tiles)};
}

StaticMask mask_of(const DenseAttention&, const ScaleSchedule& schedule, int k) {
  const Mask all = dense_mask(schedule, k);
  return {all, all};
}

StaticMask mask_of(const CslaAttention& method, const ScaleSchedule& schedule, int k) {
  CslaAttention each = method;
  each.form = CslaAttention::Form::lists;
  each.group = {1, 1, 1};
  return {csla_mask(each, schedule, k), csla_mask(method, schedule, k)};
}

StaticMask mask_of(const Cs4aAttention& method, const ScaleSchedule& schedule, int k) {
  if (k <= method.decision_scale) return mask_of(DenseAttention{}, schedule, k);
  const QueryTiles tiles = group_tiles(schedule[k], method.group);
  Selection nothing;  // what is left is what every list gets
  nothing.lists = 1;
  nothing.groups = group_tiles(schedule[method.decision_scale], method.group).count();
  const Mask windows{tiles, carry_keys(method, schedule, k, tiles, nothing)};
  return {windows, windows};
}

StaticMask mask_of(const ProbeAttention& method, const ScaleSchedule& schedule, int k) {
  const QueryTiles tiles = group_tiles(schedule[k], method.group);
  const Mask fixed{tiles, probe_windows(schedule, k, method, tiles)};
  return {fixed, fixed};
}

std::string text_of(const Cs4aAttention& method, const ScaleSchedule& schedule, int k) {
  const int s = method.decision_scale;
  const int kept = chosen_keys(method, schedule, k);
  if (k < s) return "";
  if (k == s)
    return fmt::format("scale {} runs dense and decides: {} keys a group, layer and head are kept for the scales above",
                       k, kept_keys(method.share, keys_of(schedule, s), method.granularity));
  return fmt::format(
      "the picture chooses {} keys a group, layer and head at scale {}, which are carried up and added to the windows",
      kept, s);
}

std::string text_of(const ProbeAttention& method, const ScaleSchedule& schedule, int k) {
  const ProbeLayout layout = probe_layout(schedule[k], method);
  return fmt::format(
      "the picture chooses {} keys a tile, layer and head, which are added to windows and sinks; the {} probes of {} "
      "queries also run dense",
      chosen_keys(method, schedule, k), layout.probe_rows.size(), schedule[k].tokens());
}

}  // namespace

StaticMask static_mask(const AttentionMethod& method, const ScaleSchedule& schedule, int k) {
  return std::visit([&](const auto& m) { return mask_of(m, schedule, k); }, method);
}

int chosen_keys(const AttentionMethod& method, const ScaleSchedule& schedule, int k) {
  if (const auto* probe = std::get_if<ProbeAttention>(&method)) return kept_keys(probe->share, keys_of(schedule, k), 1);
  const auto* cs4a = std::get_if<Cs4aAttention>(&method);
  if (cs4a == nullptr || k <= cs4a->decision_scale) return 0;
  return kept_keys(cs4a->share, keys_of(schedule, cs4a->decision_scale), cs4a->granularity);
}

std::string dynamic_part(const AttentionMethod& method, const ScaleSchedule& schedule, int k) {
  if (const auto* probe = std::get_if<ProbeAttention>(&method)) return text_of(*probe, schedule, k);
  if (const auto* cs4a = std::get_if<Cs4aAttention>(&method)) return text_of(*cs4a, schedule, k);
  return "";
}

const char* name_of(const AttentionMethod& method) {
  constexpr const char* kNames[] = {"dense", "csla", "cs4a", "probe"};
  static_assert(std::variant_size_v<AttentionMethod> == std::size(kNames));
  return kNames[method.index()];
}

KeyCount keys_per_query(const Mask& mask) {
  KeyCount count{std::numeric_limits<std::int64_t>::max(), 0, 0};
  double sum = 0;
  for (int list = 0; list < mask.lists.lists; ++list)
    for (int t = 0; t < mask.tiles.count(); ++t) {
      const std::int64_t keys = mask.lists.keys_in(list, t);
      count.least = std::min(count.least, keys);
      count.most = std::max(count.most, keys);
      sum += static_cast<double>(keys) * mask.tiles.rows_in(t);
    }
  count.mean = sum / (static_cast<double>(mask.lists.lists) * static_cast<double>(mask.tiles.rows.size()));
  return count;
}

std::int64_t BlockMap::count() const { return std::count(computed.begin(), computed.end(), 1); }

BlockMap block_map(const Mask& mask, int queries, int keys, int side) {
  BlockMap map{side, (queries + side - 1) / side, (keys + side - 1) / side, {}};
  map.computed.assign(static_cast<std::size_t>(map.rows) * map.columns, 0);
  std::vector<std::uint8_t> seen(map.columns);
  for (int t = 0; t < mask.tiles.count(); ++t) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int list = 0; list < mask.lists.lists; ++list) {
      const std::int64_t at = static_cast<std::int64_t>(list) * mask.lists.tiles + t;
      for (std::int64_t r = mask.lists.offset[at]; r < mask.lists.offset[at + 1]; ++r) {
        const KeyRun run = mask.lists.runs[r];
        std::fill(seen.begin() + run.begin / side, seen.begin() + (run.begin + run.count - 1) / side + 1, 1);
      }
    }
    int last = -1;
    for (int i = mask.tiles.offset[t]; i < mask.tiles.offset[t + 1]; ++i) {
      const int row = mask.tiles.rows[i] / side;
      if (row == last) continue;
      last = row;
      std::uint8_t* to = map.computed.data() + static_cast<std::ptrdiff_t>(row) * map.columns;
      for (int column = 0; column < map.columns; ++column) to[column] |= seen[column];
    }
  }
  return map;
}

Mask whole_blocks(const BlockMap& blocks, int queries, int keys) {
  Mask mask{row_tiles(queries, blocks.side), {}};
  mask.lists.tiles = mask.tiles.count();
  KeySet set(keys);
  for (int row = 0; row < blocks.rows; ++row) {
    for (int column = 0; column < blocks.columns; ++column)
      if (blocks.computed[static_cast<std::size_t>(row) * blocks.columns + column] != 0)
        set.add(column * blocks.side, blocks.side);
    set.flush(mask.lists);
  }
  return mask;
}

Survey survey(const StaticMask& mask, const ScaleSchedule& schedule, int k, int block) {
  const int keys = keys_of(schedule, k);
  const auto sparsity = [keys](const Mask& m) { return 1 - share_of_pairs(m.tiles, m.lists, keys); };
  return {keys_per_query(mask.tokens), keys_per_query(mask.lists), sparsity(mask.tokens), sparsity(mask.lists),
          block_map(mask.tokens, schedule[k].tokens(), keys, block)};
}

}  // namespace sparvar
