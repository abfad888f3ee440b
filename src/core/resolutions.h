// The scale schedules that Infinity was trained on, by aspect ratio and size.
// Facts from upstream's infinity/utils/dynamic_resolution.py.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "sparvar/schedule.h"

namespace sparvar {

struct Resolution {
  double ratio = 1;        // height / width
  ScaleSchedule schedule;  // token grids of a 1M picture: 13 scales
};

/// All aspect ratios: 1.000, 1.250 ... 3.000 and their inverses, cut to three decimals (0.800 ... 0.333).
const std::vector<Resolution>& resolutions_1m();

/// The 1M schedule of a ratio of the list (to 0.002), or null.
const ScaleSchedule* schedule_1m(double ratio);

/// The resolution whose 1M schedule begins with `schedule`, or null. Where several begin alike, the one whose ratio is
/// nearest to the last grid's.
const Resolution* resolution_of(const ScaleSchedule& schedule);

/// The sizes, smallest first, and how many of the 13 scales each has.
struct SizeName {
  std::string_view name;
  int scales = 0;
};
inline constexpr SizeName kSizes[] = {{"0.06M", 7}, {"0.25M", 10}, {"0.60M", 12}, {"1M", 13}};

/// Nothing for other names.
std::optional<int> scales_of_size(std::string_view size);

/// The last grid of the 1M schedule of resolution_of(schedule): RoPE positions of every size map to it.
std::optional<Grid> rope_grid_of(const ScaleSchedule& schedule);

}  // namespace sparvar
