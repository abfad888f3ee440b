// Looks at the queries and keys of a run: probabilities of a sample of queries, and what they say of the model.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "attention/statistics.h"
#include "backend/backend.h"

namespace sparvar {

struct AnalyzerOptions {
  ScaleSchedule schedule;
  std::vector<int> scales;  // those that are looked at
  int side = 16;            // at most side x side queries of a scale are looked at
  CslaAttention windows;    // shares are counted by its windows and sink scales
};

/// Probabilities of the sampled queries of one layer and scale, all heads: [head][query][key], keys of scales 0 .. k.
struct SampledAttention {
  int layer = 0;
  int scale = 0;
  int heads = 0;
  int keys = 0;
  std::vector<std::int32_t> tokens;  // of the queries
  std::vector<float> probabilities;
  const float* row(int head, int query) const {
    return probabilities.data() + (static_cast<std::size_t>(head) * tokens.size() + static_cast<std::size_t>(query)) *
                                      static_cast<std::size_t>(keys);
  }
};

/// Memory: the probabilities of one layer and scale, and the sampled queries of one scale. Of a batch its first entry
/// is looked at: the conditional half of the first picture.
class AttentionAnalyzer {
 public:
  explicit AttentionAnalyzer(AnalyzerOptions options);

  /// Where set, sees every sample after it was counted.
  std::function<void(const SampledAttention&)> on_sample;

  /// Before attention at (layer, scale) runs; layers and scales come in order. Tensors are on the host.
  void observe(int layer, int scale, const AttentionArgs& args);

  /// Counts probabilities that the caller has: those of one head at (layer, scale), of the queries sampled_tokens()
  /// names: rows [sampled][keys of scales 0 .. scale]. `before` [sampled][keys of scales 0 .. scale - 1]: those of the
  /// queries of the scale below that lie under them (token_under()); empty: similarity is left out. Throws Error(usage)
  /// where the sizes are others, or the scale is not looked at.
  void count(int layer, int scale, int head, int heads, std::span<const float> rows, std::span<const float> before);

  const AnalyzerOptions& options() const { return options_; }
  /// By (layer, scale): the sums of each head over all queries of all pictures seen.
  const std::map<std::pair<int, int>, std::vector<HeadSums>>& sums() const { return sums_; }

 private:
  bool looked_at(int scale) const;
  void keep_parents(int layer, int scale, const Tensor& q);

  AnalyzerOptions options_;
  std::vector<int> first_;                         // first key of each scale, and one past the last
  std::map<int, AttentionStatistics> statistics_;  // by scale
  std::map<int, std::vector<float>> parents_;      // by layer: queries [head][sampled][channel] one scale below
  std::map<std::pair<int, int>, std::vector<HeadSums>> sums_;
};

/// Rows `tokens` of head `head` of a tensor [B, H, n, D], first batch entry, as numbers [tokens][D].
std::vector<float> rows_of_head(const Tensor& x, int head, const std::vector<std::int32_t>& tokens);

}  // namespace sparvar
