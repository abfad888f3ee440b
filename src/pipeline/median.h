// The middle of what was measured.
#pragma once

#include <algorithm>
#include <vector>

namespace sparvar {

/// Upper median; `values` is not empty.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Of value(run) over all runs.
template <typename Run, typename Value>
double median_of(const std::vector<Run>& runs, Value value) {
  std::vector<double> values;
  values.reserve(runs.size());
  for (const Run& run : runs) values.push_back(value(run));
  return median(std::move(values));
}

}  // namespace sparvar
