// Attention of one query to its list of keys, in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "attention/key_run.h"

namespace sparvar::testing {

/// Softmax weights of one query over its list, and the output.
struct Reference {
  std::vector<double> out;
  double largest = 0, total = 0;
};

inline Reference attend(const float* q, const float* k, const float* v, int dim, double scale, const KeyRun* begin,
                        const KeyRun* end) {
  Reference r{std::vector<double>(dim, 0.0), -INFINITY, 0};
  std::vector<std::pair<int, double>> logits;
  for (const KeyRun* run = begin; run != end; ++run)
    for (int i = 0; i < run->count; ++i) {
      double dot = 0;
      for (int d = 0; d < dim; ++d) dot += static_cast<double>(q[d]) * k[(run->begin + i) * dim + d];
      logits.emplace_back(run->begin + i, dot * scale);
      r.largest = std::max(r.largest, dot * scale);
    }
  for (const auto& [key, x] : logits) r.total += std::exp(x - r.largest);
  for (const auto& [key, x] : logits)
    for (int d = 0; d < dim; ++d) r.out[d] += std::exp(x - r.largest) / r.total * v[key * dim + d];
  return r;
}

}  // namespace sparvar::testing
