// Scale schedules: the grids a picture is drawn on, from 1x1 up.
#pragma once

#include <cstdint>
#include <vector>

namespace sparvar {

/// One token map, in tokens. Tokens are row-major: index = row * w + col.
struct Grid {
  int h = 0;
  int w = 0;
  int tokens() const { return h * w; }
  bool operator==(const Grid&) const = default;
};

/// Grids of scales 0..K-1. Nothing assumes h == w.
using ScaleSchedule = std::vector<Grid>;

}  // namespace sparvar
