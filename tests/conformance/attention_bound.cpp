#include "conformance/attention_bound.h"

#include <algorithm>
#include <cmath>

namespace sparvar::conformance {
namespace {

constexpr double kF32 = 1e-6;  // what f32 sums and exponentials add, in shares of a logit or of an output

Tensor rounded(const Tensor& x) { return x.to(DType::bf16).to(DType::f32); }

/// One query and the keys of its list.
struct Row {
  std::vector<int> keys;
  std::vector<double> probability;
  double delta = 0;
};

Row row_of(const float* q, const float* q_rounded, const float* k, const float* k_rounded, int dim, double scale,
           std::vector<int> keys) {
  Row row{.keys = std::move(keys), .probability = {}, .delta = 0};
  double largest = -INFINITY, sum = 0;
  for (const int key : row.keys) {
    double logit = 0, moved = 0, size = 0;
    for (int d = 0; d < dim; ++d) {
      const double product = static_cast<double>(q[d]) * k[std::int64_t{key} * dim + d];
      logit += product;
      moved += static_cast<double>(q_rounded[d]) * k_rounded[std::int64_t{key} * dim + d] - product;
      size += std::abs(product);
    }
    row.probability.push_back(logit * scale);
    largest = std::max(largest, logit * scale);
    row.delta = std::max(row.delta, (std::abs(moved) + kF32 * size) * scale);
  }
  for (double& p : row.probability) sum += p = std::exp(p - largest);
  for (double& p : row.probability) p /= sum;
  return row;
}

std::vector<int> keys_of(const KeyLists& lists, std::int64_t at) {
  std::vector<int> keys;
  for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
    for (int i = 0; i < lists.runs[r].count; ++i) keys.push_back(lists.runs[r].begin + i);
  return keys;
}

/// Of one query: adds to the sums of its tile and sets its output's bounds [D].
void add_row(const Row& row, const float* v, int dim, float* out, float* sums) {
  const double factor = std::exp(2 * row.delta);
  const double weighted = factor * std::pow(1 + kBf16Rounding, 3) - 1;
  for (std::size_t i = 0; i < row.keys.size(); ++i)
    sums[row.keys[i]] += static_cast<float>((factor - 1 + kF32) * row.probability[i]);
  for (int d = 0; d < dim; ++d) {
    double value = 0, size = 0;
    for (std::size_t i = 0; i < row.keys.size(); ++i) {
      const double x = row.probability[i] * v[std::int64_t{row.keys[i]} * dim + d];
      value += x;
      size += std::abs(x);
    }
    const double moved = (weighted + kF32) * size;
    out[d] = static_cast<float>(moved + kBf16Rounding * (std::abs(value) + moved));
  }
}

}  // namespace

Bf16Bounds bf16_bounds(const AttentionArgs& f32, const QueryTiles& tiles, const KeyLists& lists) {
  const std::int64_t heads = f32.q.dim(1), n = f32.q.dim(2), keys = f32.k.dim(2);
  const int dim = static_cast<int>(f32.q.dim(3));
  const Tensor q = rounded(f32.q), k = rounded(f32.k);
  Bf16Bounds bounds{Tensor::zeros(DType::f32, {f32.q.dim(0), n, heads, dim}),
                    Tensor::zeros(DType::f32, {f32.q.dim(0) * heads, tiles.count(), keys})};
  for (std::int64_t bh = 0; bh < f32.q.dim(0) * heads; ++bh)
    for (int t = 0; t < tiles.count(); ++t) {
      const std::vector<int> list = keys_of(lists, (lists.lists == 1 ? 0 : bh) * lists.tiles + t);
      for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i) {
        const std::int64_t query = (bh * n + tiles.rows[i]) * dim, key = bh * keys * dim;
        const Row row = row_of(f32.q.data<float>() + query, q.data<float>() + query, f32.k.data<float>() + key,
                               k.data<float>() + key, dim, f32.scale, list);
        add_row(row, f32.v.data<float>() + key, dim,
                bounds.out.data<float>() + ((bh / heads * n + tiles.rows[i]) * heads + bh % heads) * dim,
                bounds.sums.data<float>() + (bh * tiles.count() + t) * keys);
      }
    }
  return bounds;
}

}  // namespace sparvar::conformance
