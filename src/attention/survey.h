// What a plan reads at a scale, drawn and counted: by query, by list, by block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/key_lists.h"
#include "sparvar/attention_plan.h"

namespace sparvar {

/// Which keys the queries of a scale read.
struct Mask {
  QueryTiles tiles;
  KeyLists lists;
};

/// The part of a method at scale k that follows from the schedule alone. Dense: everything. CSLA: all of it. Probe:
/// windows and sinks. CS4A: the windows of the scales above the decision scale; there and below it is dense.
struct StaticMask {
  Mask tokens;  // what the method shows each query
  Mask lists;   // what the kernel computes: the union over each tile, or whole blocks
};
StaticMask static_mask(const AttentionMethod& method, const ScaleSchedule& schedule, int k);

/// Keys that a query gets beside those of the static mask because of the picture; 0: the mask is all there is.
int chosen_keys(const AttentionMethod& method, const ScaleSchedule& schedule, int k);
/// What at the scale depends on the picture, in a sentence; empty: nothing.
std::string dynamic_part(const AttentionMethod& method, const ScaleSchedule& schedule, int k);
/// As in JSON: dense, csla, cs4a, probe.
const char* name_of(const AttentionMethod& method);

struct KeyCount {
  std::int64_t least = 0;
  double mean = 0;
  std::int64_t most = 0;
};
/// Over all queries and lists.
KeyCount keys_per_query(const Mask& mask);

/// Blocks of side x side (queries x keys, row order), 1 where one pair or more of any list is in it.
struct BlockMap {
  int side = 128;
  int rows = 0;
  int columns = 0;
  std::vector<std::uint8_t> computed;  // [rows][columns]
  std::int64_t count() const;
  double sparsity() const { return 1 - static_cast<double>(count()) / (static_cast<double>(rows) * columns); }
};
BlockMap block_map(const Mask& mask, int queries, int keys, int side);
/// The mask that computes whole blocks.
Mask whole_blocks(const BlockMap& blocks, int queries, int keys);

/// All of the figures of a scale.
struct Survey {
  KeyCount tokens, lists;
  double token_sparsity = 0;  // of query-key pairs; of the tokens mask
  double list_sparsity = 0;   // of the lists mask
  BlockMap blocks;            // of the tokens mask
};
Survey survey(const StaticMask& mask, const ScaleSchedule& schedule, int k, int block);

}  // namespace sparvar
