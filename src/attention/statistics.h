// What attention looks like: where the weight of a query lies, and how alike neighbouring scales are. The three
// properties that SparVAR's methods stand on: sinks, locality, similarity across scales.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "attention/csla.h"
#include "sparvar/attention_plan.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// At most side x side tokens of a grid, in the middle of equal cells, in row order.
std::vector<std::int32_t> sampled_tokens(Grid grid, int side);
/// The token of `to` that lies under the centre of a token of `from`.
std::int32_t token_under(std::int32_t token, Grid from, Grid to);

/// Pearson's correlation of pairs that come one by one.
struct Correlation {
  double count = 0, a = 0, b = 0, aa = 0, bb = 0, ab = 0;
  void add(double x, double y);
  double value() const;  // NaN where one side does not vary
};

/// Bin d: keys whose distance to the query's place rounds to d, in tokens of the key scale, the larger of both axes;
/// the last bin holds all that are farther.
constexpr int kDistanceBins = 16;
struct Distances {
  std::array<double, kDistanceBins> weight{};  // sum of probabilities
  std::array<double, kDistanceBins> keys{};
  double weighted = 0;  // sum of probability times distance
};

/// Sums over the queries of one layer, head and scale.
struct HeadSums {
  double queries = 0;
  std::vector<double> mass;             // probability by key scale
  double windows = 0;                   // probability in the windows, sink scales not counted
  std::vector<Distances> distances;     // by key scale
  std::vector<Correlation> similarity;  // by key scale i: A(k, i) with A(k-1, i-1) resized; the first has none
  double sinks(int scales) const;       // share of the first `scales` key scales
  double window_share() const { return windows / queries; }
  double mass_share(int j) const { return mass[static_cast<std::size_t>(j)] / queries; }
  double mean_distance(int j) const;  // NaN where the scale has no weight
  double mean_similarity() const;     // over key scales that have one; NaN where none has
};

/// For the queries of scale k.
class AttentionStatistics {
 public:
  /// `windows`: the windows and sink scales that shares are counted by.
  AttentionStatistics(const ScaleSchedule& schedule, int k, const CslaAttention& windows);

  HeadSums nothing() const;
  /// `row`: the probabilities of query `token` over the keys of scales 0 .. k. `before`: those of the token of scale
  /// k - 1 that lies under it, over the keys of scales 0 .. k - 1; empty: similarity is left out.
  void add(HeadSums& sums, std::int32_t token, std::span<const float> row, std::span<const float> before) const;

 private:
  /// One axis of a bilinear resize (align_corners = false): value i is (1 - weight) * from[low] + weight * from[high].
  struct Step {
    int low = 0, high = 0;
    double weight = 0;
  };
  struct KeyScale {
    Grid grid;
    int first = 0;                          // key
    std::vector<Bounds> rows, columns;      // of each query row and column; empty for sink scales
    std::vector<Step> up_rows, up_columns;  // from the key scale before
  };
  static std::vector<Step> steps(int from, int to);
  void add_scale(HeadSums& sums, int j, std::int32_t token, std::span<const float> row) const;
  void add_similarity(HeadSums& sums, int j, std::span<const float> row, std::span<const float> before) const;

  Grid grid_;
  int sink_scales_ = 0;
  std::vector<KeyScale> keys_;
};

}  // namespace sparvar
