#include "attention/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sparvar {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/// The place of token i of an axis on an axis of another size, in tokens of that.
double place(int i, int size, int other) { return (i + 0.5) * other / size - 0.5; }

}  // namespace

std::vector<std::int32_t> sampled_tokens(Grid grid, int side) {
  const int rows = std::min(side, grid.h), columns = std::min(side, grid.w);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j)
      tokens.push_back((2 * i + 1) * grid.h / (2 * rows) * grid.w + (2 * j + 1) * grid.w / (2 * columns));
  return tokens;
}

std::int32_t token_under(std::int32_t token, Grid from, Grid to) {
  const int y = token / from.w, x = token % from.w;
  return (2 * y + 1) * to.h / (2 * from.h) * to.w + (2 * x + 1) * to.w / (2 * from.w);
}

void Correlation::add(double x, double y) {
  count += 1;
  a += x;
  b += y;
  aa += x * x;
  bb += y * y;
  ab += x * y;
}

double Correlation::value() const {
  const double va = aa - a * a / count, vb = bb - b * b / count;
  // What rounding leaves of numbers that are all the same is not a variance.
  if (count < 2 || va <= 1e-12 * aa || vb <= 1e-12 * bb) return kNone;
  return (ab - a * b / count) / std::sqrt(va * vb);
}

double HeadSums::sinks(int scales) const {
  const auto end = mass.begin() + std::min<std::ptrdiff_t>(scales, static_cast<std::ptrdiff_t>(mass.size()));
  return std::accumulate(mass.begin(), end, 0.0) / queries;
}

double HeadSums::mean_distance(int j) const {
  const double weight = mass[static_cast<std::size_t>(j)];
  return weight > 0 ? distances[static_cast<std::size_t>(j)].weighted / weight : kNone;
}

double HeadSums::mean_similarity() const {
  double sum = 0;
  int count = 0;
  for (const Correlation& one : similarity)
    if (const double value = one.value(); !std::isnan(value)) {
      sum += value;
      ++count;
    }
  return count > 0 ? sum / count : kNone;
}

std::vector<AttentionStatistics::Step> AttentionStatistics::steps(int from, int to) {
  std::vector<Step> out(static_cast<std::size_t>(to));
  for (int i = 0; i < to; ++i) {
    const double at = std::max(place(i, to, from), 0.0);
    const int low = static_cast<int>(at);
    out[static_cast<std::size_t>(i)] = {low, std::min(low + 1, from - 1), at - low};
  }
  return out;
}

AttentionStatistics::AttentionStatistics(const ScaleSchedule& schedule, int k, const CslaAttention& windows)
    : grid_(schedule[static_cast<std::size_t>(k)]), sink_scales_(windows.sink_scales) {
  const std::vector<int> first = first_keys(schedule, k);
  for (int j = 0; j <= k; ++j) {
    KeyScale scale;
    scale.grid = schedule[static_cast<std::size_t>(j)];
    scale.first = first[static_cast<std::size_t>(j)];
    if (j >= sink_scales_) {
      scale.rows = axis_bounds(schedule, k, j, windows, true);
      scale.columns = axis_bounds(schedule, k, j, windows, false);
    }
    if (j > 0) {
      const Grid before = schedule[static_cast<std::size_t>(j) - 1];
      scale.up_rows = steps(before.h, scale.grid.h);
      scale.up_columns = steps(before.w, scale.grid.w);
    }
    keys_.push_back(std::move(scale));
  }
}

HeadSums AttentionStatistics::nothing() const {
  HeadSums sums;
  sums.mass.resize(keys_.size());
  sums.distances.resize(keys_.size());
  sums.similarity.resize(keys_.size());
  return sums;
}

void AttentionStatistics::add_scale(HeadSums& sums, int j, std::int32_t token, std::span<const float> row) const {
  const KeyScale& scale = keys_[static_cast<std::size_t>(j)];
  const int y = token / grid_.w, x = token % grid_.w;
  const double centre_y = place(y, grid_.h, scale.grid.h), centre_x = place(x, grid_.w, scale.grid.w);
  Bounds rows, columns;
  if (!scale.rows.empty()) {
    rows = scale.rows[static_cast<std::size_t>(y)];
    columns = scale.columns[static_cast<std::size_t>(x)];
  }
  Distances& distances = sums.distances[static_cast<std::size_t>(j)];
  const float* weights = row.data() + scale.first;
  for (int v = 0; v < scale.grid.h; ++v)
    for (int u = 0; u < scale.grid.w; ++u) {
      const double weight = *weights++;
      sums.mass[static_cast<std::size_t>(j)] += weight;
      if (v >= rows.begin && v < rows.end && u >= columns.begin && u < columns.end) sums.windows += weight;
      const double distance = std::max(std::abs(v - centre_y), std::abs(u - centre_x));
      const auto bin = static_cast<std::size_t>(std::min<long>(std::lround(distance), kDistanceBins - 1));
      distances.weight[bin] += weight;
      distances.keys[bin] += 1;
      distances.weighted += weight * distance;
    }
}

void AttentionStatistics::add_similarity(HeadSums& sums, int j, std::span<const float> row,
                                         std::span<const float> before) const {
  const KeyScale& scale = keys_[static_cast<std::size_t>(j)];
  const KeyScale& smaller = keys_[static_cast<std::size_t>(j) - 1];
  const float* weights = row.data() + scale.first;
  const float* map = before.data() + smaller.first;
  const auto mixed = [](double low, double high, double weight) { return low + weight * (high - low); };
  for (const Step& r : scale.up_rows) {
    const float* low = map + static_cast<std::ptrdiff_t>(r.low) * smaller.grid.w;
    const float* high = map + static_cast<std::ptrdiff_t>(r.high) * smaller.grid.w;
    for (const Step& c : scale.up_columns)
      sums.similarity[static_cast<std::size_t>(j)].add(
          *weights++,
          mixed(mixed(low[c.low], low[c.high], c.weight), mixed(high[c.low], high[c.high], c.weight), r.weight));
  }
}

void AttentionStatistics::add(HeadSums& sums, std::int32_t token, std::span<const float> row,
                              std::span<const float> before) const {
  sums.queries += 1;
  for (int j = 0; j < static_cast<int>(keys_.size()); ++j) {
    add_scale(sums, j, token, row);
    if (j > 0 && !before.empty()) add_similarity(sums, j, row, before);
  }
}

}  // namespace sparvar
