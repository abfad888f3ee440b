#include "pipeline/analyze.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

/// softmax(scale q k^T): q [rows][D], k [keys][D] -> out [rows][keys].
void probabilities(const std::vector<float>& q, const std::vector<float>& k, int channels, float scale, float* out) {
  const auto rows = static_cast<std::int64_t>(q.size()) / channels;
  const auto keys = static_cast<std::int64_t>(k.size()) / channels;
  parallel_for(rows, [&](std::int64_t r) {
    const float* query = q.data() + r * channels;
    float* weights = out + r * keys;
    float largest = -INFINITY;
    for (std::int64_t key = 0; key < keys; ++key) {
      const float* at = k.data() + key * channels;
      float dot = 0;
      for (int c = 0; c < channels; ++c) dot += query[c] * at[c];
      weights[key] = scale * dot;
      largest = std::max(largest, weights[key]);
    }
    double total = 0;
    for (std::int64_t key = 0; key < keys; ++key) total += weights[key] = std::exp(weights[key] - largest);
    for (std::int64_t key = 0; key < keys; ++key) weights[key] = static_cast<float>(weights[key] / total);
  });
}

std::vector<std::int32_t> tokens_under(const std::vector<std::int32_t>& tokens, Grid from, Grid to) {
  std::vector<std::int32_t> out;
  out.reserve(tokens.size());
  for (const std::int32_t token : tokens) out.push_back(token_under(token, from, to));
  return out;
}

}  // namespace

std::vector<float> rows_of_head(const Tensor& x, int head, const std::vector<std::int32_t>& tokens) {
  const std::int64_t channels = x.dim(3);
  std::vector<float> out;
  out.reserve(tokens.size() * static_cast<std::size_t>(channels));
  for (const std::int32_t token : tokens) {
    const std::int64_t at = (head * x.dim(2) + token) * channels;
    for (std::int64_t c = 0; c < channels; ++c)
      out.push_back(x.dtype() == DType::f32 ? x.data<float>()[at + c] : to_float(x.data<BFloat16>()[at + c]));
  }
  return out;
}

AttentionAnalyzer::AttentionAnalyzer(AnalyzerOptions options) : options_(std::move(options)) {
  const int scales = static_cast<int>(options_.schedule.size());
  first_ = first_keys(options_.schedule, scales - 1);
  for (const int k : options_.scales) {
    if (k < 0 || k >= scales)
      throw Error(ErrorKind::usage, fmt::format("scale {}: this model's scales are 0 to {}", k, scales - 1));
    statistics_.try_emplace(k, options_.schedule, k, options_.windows);
  }
}

bool AttentionAnalyzer::looked_at(int scale) const { return statistics_.contains(scale); }

/// Keys stay in the cache; of the queries only those under the ones that are looked at a scale above are kept.
void AttentionAnalyzer::keep_parents(int layer, int scale, const Tensor& q) {
  const Grid grid = options_.schedule[static_cast<std::size_t>(scale)];
  const Grid next = options_.schedule[static_cast<std::size_t>(scale) + 1];
  const std::vector<std::int32_t> tokens = tokens_under(sampled_tokens(next, options_.side), next, grid);
  std::vector<float>& kept = parents_[layer];
  kept.clear();
  for (int head = 0; head < q.dim(1); ++head) {
    const std::vector<float> rows = rows_of_head(q, head, tokens);
    kept.insert(kept.end(), rows.begin(), rows.end());
  }
}

void AttentionAnalyzer::count(int layer, int scale, int head, int heads, std::span<const float> rows,
                              std::span<const float> before) {
  const auto found = statistics_.find(scale);
  if (found == statistics_.end())
    throw Error(ErrorKind::usage, fmt::format("analyze: scale {} is not one that is looked at", scale));
  const AttentionStatistics& statistics = found->second;
  const auto at = static_cast<std::size_t>(scale);
  const std::vector<std::int32_t> tokens = sampled_tokens(options_.schedule[at], options_.side);
  const auto keys = static_cast<std::size_t>(first_[at + 1]), keys_before = static_cast<std::size_t>(first_[at]);
  if (rows.size() != tokens.size() * keys || (!before.empty() && before.size() != tokens.size() * keys_before))
    throw Error(
        ErrorKind::usage,
        fmt::format("analyze: layer {}, scale {}: expected probabilities of {} queries over {} keys, and over {} "
                    "keys of the scale below, found {} and {} numbers",
                    layer, scale, tokens.size(), keys, keys_before, rows.size(), before.size()));
  std::vector<HeadSums>& sums = sums_[{layer, scale}];
  if (sums.empty()) sums.resize(static_cast<std::size_t>(heads), statistics.nothing());
  if (sums.size() != static_cast<std::size_t>(heads) || head < 0 || head >= heads)
    throw Error(ErrorKind::usage, fmt::format("analyze: layer {}, scale {}: head {} of {}, and {} heads before", layer,
                                              scale, head, heads, sums.size()));
  for (std::size_t i = 0; i < tokens.size(); ++i)
    statistics.add(sums[static_cast<std::size_t>(head)], tokens[i], rows.subspan(i * keys, keys),
                   before.empty() ? before : before.subspan(i * keys_before, keys_before));
}

void AttentionAnalyzer::observe(int layer, int scale, const AttentionArgs& args) {
  if (args.q.place() != Place::host) throw Error(ErrorKind::usage, "attention is analyzed on the CPU");
  if (looked_at(scale)) {
    const Grid grid = options_.schedule[static_cast<std::size_t>(scale)];
    SampledAttention sample{layer,
                            scale,
                            static_cast<int>(args.q.dim(1)),
                            first_[static_cast<std::size_t>(scale) + 1],
                            sampled_tokens(grid, options_.side),
                            {}};
    const std::size_t rows = sample.tokens.size();
    const int channels = static_cast<int>(args.q.dim(3));
    sample.probabilities.resize(static_cast<std::size_t>(sample.heads) * rows * static_cast<std::size_t>(sample.keys));
    std::vector<std::int32_t> all(static_cast<std::size_t>(sample.keys));
    std::iota(all.begin(), all.end(), 0);
    const int keys_before = first_[static_cast<std::size_t>(scale)];
    const auto parents = parents_.find(layer);
    std::vector<float> before;
    for (int head = 0; head < sample.heads; ++head) {
      std::vector<float> keys = rows_of_head(args.k, head, all);
      float* const own =
          sample.probabilities.data() + static_cast<std::size_t>(head) * rows * static_cast<std::size_t>(sample.keys);
      probabilities(rows_of_head(args.q, head, sample.tokens), keys, channels, args.scale, own);
      if (scale > 0 && parents != parents_.end()) {
        keys.resize(static_cast<std::size_t>(keys_before) * static_cast<std::size_t>(channels));
        const auto part = static_cast<std::ptrdiff_t>(rows) * channels;
        const std::vector<float> queries(parents->second.begin() + head * part,
                                         parents->second.begin() + (head + 1) * part);
        before.resize(rows * static_cast<std::size_t>(keys_before));
        probabilities(queries, keys, channels, args.scale, before.data());
      }
      count(layer, scale, head, sample.heads, {own, rows * static_cast<std::size_t>(sample.keys)}, before);
    }
    if (on_sample) on_sample(sample);
  }
  if (looked_at(scale + 1)) keep_parents(layer, scale, args.q);
}

}  // namespace sparvar
