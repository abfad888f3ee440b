// CS4A: keys chosen by column sums at the decision scale, carried to the scales above (method: SparVAR, CS4A).
#pragma once

#include <cstdint>
#include <vector>

#include "attention/key_lists.h"
#include "sparvar/attention_plan.h"

namespace sparvar {

/// Kept keys of every (list, group) of the decision scale, largest column sum first: keys[(list * groups + group) *
/// count + i].
struct Selection {
  int lists = 0;
  int groups = 0;
  int count = 0;
  std::vector<std::int32_t> keys;
  const std::int32_t* of(int list, int group) const {
    return keys.data() + (static_cast<std::int64_t>(list) * groups + group) * count;
  }
};

/// granularity * round(share * keys / granularity), at least one step, at most `keys`.
int kept_keys(double share, int keys, int granularity);

/// Indices of the `count` largest of sums[0 .. keys), ascending; of equal sums the lower index; NaN counts as smallest.
void select_top(const float* sums, int keys, int count, std::int32_t* out);

/// Selection from column sums f32 [lists, groups, keys].
Selection select_keys(const float* column_sums, int lists, int groups, int keys, int count);

/// The decision-scale group whose list a group of scale k takes: nearest by position in row order (float32, half to
/// even)...
int group_of_decision(int group, int groups, int decision_groups);
/// ... or, for tiles, the tile that holds the decision-scale token under the centre of each tile.
std::vector<int> tiles_of_decision(Grid grid, Grid decision, const QueryGroup& group);

/// The authors' local part, groups in row order: one contiguous run a group from the smallest key of the union of its
/// queries' w x w windows, all as long as the longest union rounded up to `granularity`, moved left where it would pass
/// the last key. Keys of the whole axis.
std::vector<KeyRun> local_runs(Grid grid, int first_key, int window, const QueryTiles& groups, int granularity);

/// How many keys a group chooses at the decision scale, largest number first, and how many of those, the strongest, the
/// scales above take where that is fewer.
std::vector<int> counts_to_choose(const Cs4aAttention& method, const ScaleSchedule& schedule);
/// Lists of scale k from `count` keys that each of the groups of the decision scale chose. `tiles` are scale k's
/// groups.
ListRecipe carry_recipe(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const QueryTiles& tiles,
                        int decision_groups, int count);
/// Lists of scale k from the selection at the decision scale. `tiles` are scale k's groups.
KeyLists carry_keys(const Cs4aAttention& method, const ScaleSchedule& schedule, int k, const QueryTiles& tiles,
                    const Selection& selection);

/// The key of scale k that `key` of the decision scale S stands for: ratio floor(N_k * key / N_S); grid: same place, k
/// - S scales up.
std::int32_t carry_by_ratio(std::int32_t key, std::int64_t keys_k, std::int64_t keys_s);
std::int32_t carry_by_grid(std::int32_t key, const ScaleSchedule& schedule, int k, int decision_scale);

}  // namespace sparvar
