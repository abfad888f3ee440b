// Probe attention: a grid of the scale's own queries runs dense, chooses each tile's keys and lends its residual.
#pragma once

#include "attention/key_lists.h"
#include "sparvar/attention_plan.h"

namespace sparvar {

struct ProbeLayout {
  Grid probe_grid;                       // probes, row-major
  std::vector<std::int32_t> probe_rows;  // token index of each probe
  QueryTiles tiles;                      // all queries of the scale
  QueryTiles choosers;                   // per tile, the probes (0 .. probe count) that choose its keys
};

/// Probes sit in the middle of stride x stride cells. A tile without a probe is served by the one nearest its centre.
ProbeLayout probe_layout(Grid grid, const ProbeAttention& method);

/// Windows and sinks of every tile: the part of the lists that all (batch, head) pairs share.
KeyLists probe_windows(const ScaleSchedule& schedule, int k, const ProbeAttention& method, const QueryTiles& tiles);

/// Lists made of each tile's choice, the largest of the summed probabilities of its probes: those keys, the windows
/// around the tile's queries on the last scales, and the sink scales.
ListRecipe probe_recipe(const ScaleSchedule& schedule, int k, const ProbeAttention& method, const ProbeLayout& layout);

}  // namespace sparvar
