// Which keys each tile of queries reads: plain data that every backend executes.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "attention/key_run.h"
#include "core/tensor.h"
#include "sparvar/attention_plan.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// A partition of (some of) a scale's queries into tiles: tile t holds rows[offset[t] .. offset[t+1]).
struct QueryTiles {
  std::vector<std::int32_t> offset{0};
  std::vector<std::int32_t> rows;
  int count() const { return static_cast<int>(offset.size()) - 1; }
  int rows_in(int tile) const { return offset[tile + 1] - offset[tile]; }
};

/// Keys of every (list, tile): runs[offset[l * tiles + t] .. offset[l * tiles + t + 1]), sorted by key,
/// without overlaps. lists is 1 (shared by all batch entries and heads) or batch * heads (b * heads + h).
struct KeyLists {
  int lists = 1;
  int tiles = 0;
  std::vector<std::int64_t> offset{0};
  std::vector<KeyRun> runs;
  std::int64_t keys_in(int list, int tile) const;
};

/// Throws Error(usage) where they do not fit each other, or a kernel that follows them would read what is not there or
/// a key twice: offsets that do not ascend, negative rows or keys, runs that overlap or are not sorted.
void require_sound(const QueryTiles& tiles, const KeyLists& lists);

/// Tiles of the grid, or runs in row order, as the group says.
QueryTiles group_tiles(Grid grid, const QueryGroup& group);
/// n queries in row order, `per_tile` to a tile; the last may be smaller.
QueryTiles row_tiles(int queries, int per_tile);
/// Compact th x tw tiles of the grid; ragged at the right and bottom border.
QueryTiles grid_tiles(Grid grid, int tile_h, int tile_w);
/// The list of all keys for every tile: dense attention.
KeyLists all_keys(const QueryTiles& tiles, int keys);
/// Average over queries of the keys read, over the keys there are.
double share_of_pairs(const QueryTiles& tiles, const KeyLists& lists, int keys);

/// Collects keys in any order, with repeats, and emits them sorted and without duplicates.
class KeySet {
 public:
  explicit KeySet(int keys);
  void add(int begin, int count);
  int keys() const { return keys_; }
  /// Appends this set as the next (list, tile) of `lists`, then empties the set.
  void flush(KeyLists& lists);

 private:
  int keys_;
  std::vector<std::uint64_t> words_;
};

/// Lists for every (list, tile): fill(list, tile, set) adds the keys of one. Runs on all threads.
KeyLists build_lists(int lists, int tiles, int keys, const std::function<void(int list, int tile, KeySet& set)>& fill);

/// How lists come of a choice of keys: tile t reads the first `chosen` keys that group group_of[t] chose, each replaced
/// by map[key], and the fixed runs.
struct ListRecipe {
  QueryTiles tiles;
  int keys = 0;  // all keys of the lists lie below
  int chosen = 0;
  std::vector<std::int32_t> group_of;  // per tile
  std::vector<std::int32_t> map;       // empty: keys stay as they are
  KeyLists fixed;                      // one list a tile, or no tile at all
  int most_keys() const;               // that a list can have
};
/// The lists, of a choice I32 [lists, groups, per_group].
KeyLists follow(const ListRecipe& recipe, const Tensor& choice);
KeyLists follow(const ListRecipe& recipe, const std::int32_t* choice, int lists, int groups, int per_group);

}  // namespace sparvar
