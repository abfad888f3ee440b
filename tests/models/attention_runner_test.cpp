// Whole plans, executed by the runner, against the same method written plainly in double precision.
#include "models/attention_runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "attention/probe.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_tensor;

/// One (batch, head): rows of D numbers.
using Rows = std::vector<std::vector<double>>;

const ScaleSchedule kSchedule = {{1, 1}, {2, 2}, {3, 4}, {5, 7}, {8, 11}, {12, 16}};
constexpr int kBatch = 2, kHeads = 2, kDim = 24;

Rows rows_of(const Tensor& x, int bh, std::int64_t count) {
  const std::int64_t capacity = x.dim(2);
  Rows out(count, std::vector<double>(kDim));
  for (std::int64_t i = 0; i < count; ++i)
    for (int d = 0; d < kDim; ++d) out[i][d] = x.data<float>()[(bh * capacity + i) * kDim + d];
  return out;
}

std::vector<double> weights(const std::vector<double>& q, const Rows& k, const std::set<int>& keys) {
  std::vector<double> w(k.size(), 0.0);
  double largest = -INFINITY, total = 0;
  for (const int key : keys) {
    double dot = 0;
    for (int d = 0; d < kDim; ++d) dot += q[d] * k[key][d];
    w[key] = dot;
    largest = std::max(largest, dot);
  }
  for (const int key : keys) total += w[key] = std::exp(w[key] - largest);
  for (const int key : keys) w[key] /= total;
  return w;
}

std::vector<double> attend(const std::vector<double>& q, const Rows& k, const Rows& v, const std::set<int>& keys) {
  std::vector<double> out(kDim, 0.0);
  const std::vector<double> w = weights(q, k, keys);
  for (const int key : keys)
    for (int d = 0; d < kDim; ++d) out[d] += w[key] * v[key][d];
  return out;
}

std::set<int> all(int keys) {
  std::set<int> out;
  for (int i = 0; i < keys; ++i) out.insert(i);
  return out;
}

std::set<int> listed(const KeyLists& lists, int list, int tile) {
  std::set<int> out;
  const std::int64_t at = (lists.lists == 1 ? 0 : list) * static_cast<std::int64_t>(lists.tiles) + tile;
  for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
    for (int i = 0; i < lists.runs[r].count; ++i) out.insert(lists.runs[r].begin + i);
  return out;
}

std::vector<double> resized(const Rows& map, Grid from, Grid to, int token, int d_count) {
  const int row = token / to.w, column = token % to.w;
  const double sy = std::max((row + 0.5) * from.h / to.h - 0.5, 0.0),
               sx = std::max((column + 0.5) * from.w / to.w - 0.5, 0.0);
  const int y0 = static_cast<int>(sy), x0 = static_cast<int>(sx), y1 = std::min(y0 + 1, from.h - 1),
            x1 = std::min(x0 + 1, from.w - 1);
  std::vector<double> out(d_count);
  for (int d = 0; d < d_count; ++d)
    out[d] = (1 - (sy - y0)) * ((1 - (sx - x0)) * map[y0 * from.w + x0][d] + (sx - x0) * map[y0 * from.w + x1][d]) +
             (sy - y0) * ((1 - (sx - x0)) * map[y1 * from.w + x0][d] + (sx - x0) * map[y1 * from.w + x1][d]);
  return out;
}

struct Scene {
  explicit Scene(unsigned seed) : seed_(seed) {
    const std::vector<int> first = first_keys(kSchedule, static_cast<int>(kSchedule.size()) - 1);
    k = random_tensor({kBatch, kHeads, first.back(), kDim}, seed, 0.7F);
    v = random_tensor({kBatch, kHeads, first.back(), kDim}, seed + 1);
  }
  AttentionArgs at(int scale) const {
    const int n = kSchedule[scale].tokens();
    return {.q = random_tensor({kBatch, kHeads, n, kDim}, seed_ + 10 + scale, 0.7F),
            .k = k,
            .v = v,
            .out = Tensor::zeros(DType::f32, {kBatch, n, kHeads, kDim}),
            .scale = 1.0F,
            .statistics = {}};
  }
  Tensor k, v;

 private:
  unsigned seed_;
};

/// Largest difference of args.out to want(bh, row).
template <typename Want>
double worst_difference(const AttentionArgs& args, Want want) {
  double worst = 0;
  const std::int64_t n = args.q.dim(2);
  for (int bh = 0; bh < kBatch * kHeads; ++bh)
    for (std::int64_t row = 0; row < n; ++row) {
      const std::vector<double> expected = want(bh, static_cast<int>(row));
      for (int d = 0; d < kDim; ++d)
        worst = std::max(worst,
                         std::abs(expected[d] -
                                  args.out.data<float>()[((bh / kHeads * n + row) * kHeads + bh % kHeads) * kDim + d]));
    }
  return worst;
}

std::vector<int> tile_of_row(const QueryTiles& tiles, int n) {
  std::vector<int> out(n);
  for (int t = 0; t < tiles.count(); ++t)
    for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i) out[tiles.rows[i]] = t;
  return out;
}

class Runner : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend = make_cpu_backend({.compute = DType::f32, .threads = 2});
  unsigned seed = std::random_device{}();
  Scene scene{seed};
};

TEST_F(Runner, DenseAndCsla) {
  CslaAttention csla;
  csla.windows = {-1, -1, 1, 3, 5, 5};
  csla.sink_scales = 2;
  csla.group = {3, 5, 0};
  AttentionRunner runner(*backend, {"x", {{0, -1, 5, -1, csla}}}, kSchedule, 1);
  for (const int k : {4, 5}) {
    AttentionArgs args = scene.at(k);
    runner.run(0, k, args);
    const int keys = first_keys(kSchedule, k).back();
    const QueryTiles tiles = csla_tiles(kSchedule[k], csla);
    const KeyLists lists = csla_lists(kSchedule, k, csla, tiles);
    const std::vector<int> tile = tile_of_row(tiles, kSchedule[k].tokens());
    EXPECT_LT(worst_difference(args,
                               [&](int bh, int row) {
                                 return attend(rows_of(args.q, bh, row + 1)[row], rows_of(args.k, bh, keys),
                                               rows_of(args.v, bh, keys),
                                               k == 4 ? all(keys) : listed(lists, 0, tile[row]));
                               }),
              1e-5)
        << "seed " << seed << ", scale " << k;
  }
  EXPECT_EQ(runner.share_of_pairs(4), 1.0);
  EXPECT_LT(runner.share_of_pairs(5), 0.5);
}

TEST_F(Runner, Cs4aCarriesKeysAndResidual) {
  for (const bool residual : {true, false})
    for (const QueryGroup& group : {QueryGroup{3, 4, 0}, QueryGroup{1, 1, 10}}) {
      Cs4aAttention method;
      method.decision_scale = 4;
      method.granularity = 2;
      method.share = 0.15;
      method.group = group;
      method.own_windows = {3};
      method.residual = residual;
      AttentionRunner runner(*backend, {"x", {{0, -1, 4, -1, method}}}, kSchedule, 1);
      AttentionArgs decision = scene.at(4), args = scene.at(5);
      runner.run(0, 4, decision);
      runner.run(0, 5, args);

      const int keys_s = first_keys(kSchedule, 4).back(), keys = first_keys(kSchedule, 5).back(),
                n_s = kSchedule[4].tokens();
      const QueryTiles groups = group_tiles(kSchedule[4], group), tiles = group_tiles(kSchedule[5], group);
      const std::vector<int> group_of = tile_of_row(groups, n_s), tile = tile_of_row(tiles, kSchedule[5].tokens());
      std::vector<float> sums(static_cast<std::size_t>(kBatch * kHeads) * groups.count() * keys_s, 0.0F);
      std::vector<Rows> dense(kBatch * kHeads);
      for (int bh = 0; bh < kBatch * kHeads; ++bh) {
        const Rows q = rows_of(decision.q, bh, n_s), k = rows_of(decision.k, bh, keys_s),
                   v = rows_of(decision.v, bh, keys_s);
        for (int row = 0; row < n_s; ++row) {
          dense[bh].push_back(attend(q[row], k, v, all(keys_s)));
          const std::vector<double> w = weights(q[row], k, all(keys_s));
          for (int key = 0; key < keys_s; ++key)
            sums[(static_cast<std::size_t>(bh) * groups.count() + group_of[row]) * keys_s + key] +=
                static_cast<float>(w[key]);
        }
      }
      EXPECT_LT(worst_difference(decision, [&](int bh, int row) { return dense[bh][row]; }), 1e-5) << "seed " << seed;

      const Selection selection = select_keys(sums.data(), kBatch * kHeads, groups.count(), keys_s,
                                              kept_keys(method.share, keys_s, method.granularity));
      const KeyLists lists = carry_keys(method, kSchedule, 5, tiles, selection);
      std::vector<Rows> cache = dense;
      for (int bh = 0; bh < kBatch * kHeads; ++bh)
        for (int row = 0; row < n_s; ++row) {
          const std::int32_t* chosen = selection.of(bh, group_of[row]);
          const auto sparse = attend(rows_of(decision.q, bh, n_s)[row], rows_of(decision.k, bh, keys_s),
                                     rows_of(decision.v, bh, keys_s), {chosen, chosen + selection.count});
          for (int d = 0; d < kDim; ++d) cache[bh][row][d] -= sparse[d];
        }
      EXPECT_LT(worst_difference(args,
                                 [&](int bh, int row) {
                                   auto want = attend(rows_of(args.q, bh, row + 1)[row], rows_of(args.k, bh, keys),
                                                      rows_of(args.v, bh, keys), listed(lists, bh, tile[row]));
                                   const auto extra = resized(cache[bh], kSchedule[4], kSchedule[5], row, kDim);
                                   for (int d = 0; residual && d < kDim; ++d) want[d] += extra[d];
                                   return want;
                                 }),
                3e-5)
          << "seed " << seed << ", rows " << group.rows;
    }
}

TEST_F(Runner, WhatIsCarriedMayBeKeptByTheCaller) {
  Cs4aAttention method;
  method.decision_scale = 4;
  method.granularity = 1;
  method.group = {3, 4, 0};
  const AttentionPlan plan{"x", {{0, -1, 4, -1, method}}};
  AttentionRunner whole(*backend, plan, kSchedule, 2);
  AttentionArgs decision = scene.at(4), args = scene.at(5);
  whole.run(1, 4, decision);
  whole.run(1, 5, args);
  const Tensor expected = args.out.to(DType::f32);

  AttentionRunner one(*backend, plan, kSchedule, 2), other(*backend, plan, kSchedule, 2);
  const std::int64_t groups = group_tiles(kSchedule[4], method.group).count();
  const CarriedKeys kept{
      .choice = backend->empty(DType::i32, {kBatch * kHeads, groups, counts_to_choose(method, kSchedule).front()}),
      .residual = backend->empty(DType::f32, decision.out.shape())};
  EXPECT_THROW(one.run(1, 4, decision, {.choice = kept.choice.rows(0, 1), .residual = {}}), Error);
  one.run(1, 4, decision, kept);
  EXPECT_THROW(other.run(1, 5, args), Error) << "nothing is carried";
  other.carry(1, kept);
  backend->fill_zero(args.out);
  other.run(1, 5, args);
  ASSERT_EQ(args.out.size(), expected.size());
  EXPECT_TRUE(std::equal(expected.data<float>(), expected.data<float>() + expected.size(), args.out.data<float>()));
  other.release();
  EXPECT_THROW(other.run(1, 5, args), Error);
}

TEST_F(Runner, ProbesChooseAndLendTheirResidual) {
  for (const bool residual : {true, false}) {
    ProbeAttention method;
    method.stride = 4;
    method.share = 0.08;
    method.group = {3, 4, 0};
    method.window = 3;
    method.window_scales = 2;
    method.residual = residual;
    AttentionRunner runner(*backend, {"x", {{0, -1, 5, -1, method}}}, kSchedule, 1);
    AttentionArgs args = scene.at(5);
    runner.run(0, 5, args);

    const Grid grid = kSchedule[5];
    const int keys = first_keys(kSchedule, 5).back();
    const ProbeLayout layout = probe_layout(grid, method);
    std::vector<float> sums(static_cast<std::size_t>(kBatch * kHeads) * layout.tiles.count() * keys, 0.0F);
    std::vector<Rows> dense(kBatch * kHeads);
    for (int bh = 0; bh < kBatch * kHeads; ++bh) {
      const Rows q = rows_of(args.q, bh, grid.tokens()), k = rows_of(args.k, bh, keys), v = rows_of(args.v, bh, keys);
      for (const int row : layout.probe_rows) dense[bh].push_back(attend(q[row], k, v, all(keys)));
      for (int t = 0; t < layout.tiles.count(); ++t)
        for (int i = layout.choosers.offset[t]; i < layout.choosers.offset[t + 1]; ++i) {
          const std::vector<double> w = weights(q[layout.probe_rows[layout.choosers.rows[i]]], k, all(keys));
          for (int key = 0; key < keys; ++key)
            sums[(static_cast<std::size_t>(bh) * layout.tiles.count() + t) * keys + key] += static_cast<float>(w[key]);
        }
    }
    const ListRecipe recipe = probe_recipe(kSchedule, 5, method, layout);
    const int tiles = layout.tiles.count();
    const Selection choice = select_keys(sums.data(), kBatch * kHeads, tiles, recipe.keys, recipe.chosen);
    const KeyLists lists = follow(recipe, choice.keys.data(), kBatch * kHeads, tiles, recipe.chosen);
    const std::vector<int> tile = tile_of_row(layout.tiles, grid.tokens());
    const auto sparse = [&](int bh, int row) {
      return attend(rows_of(args.q, bh, row + 1)[row], rows_of(args.k, bh, keys), rows_of(args.v, bh, keys),
                    listed(lists, bh, tile[row]));
    };
    std::vector<Rows> difference = dense;
    for (int bh = 0; bh < kBatch * kHeads; ++bh)
      for (std::size_t p = 0; p < layout.probe_rows.size(); ++p) {
        const auto part = sparse(bh, layout.probe_rows[p]);
        for (int d = 0; d < kDim; ++d) difference[bh][p][d] -= part[d];
      }
    EXPECT_LT(worst_difference(args,
                               [&](int bh, int row) {
                                 auto want = sparse(bh, row);
                                 const auto extra = resized(difference[bh], layout.probe_grid, grid, row, kDim);
                                 for (int d = 0; residual && d < kDim; ++d) want[d] += extra[d];
                                 return want;
                               }),
              3e-5)
        << "seed " << seed;
  }
}

/// x [B, H, n, D] with the tokens of every scale moved to their places; `scale`: x has the tokens of that one alone.
Tensor moved(const Tensor& x, TokenOrder order, int scale = -1) {
  Tensor out = Tensor::empty(DType::f32, x.shape());
  const std::vector<int> first = first_keys(kSchedule, static_cast<int>(kSchedule.size()) - 1);
  for (std::int64_t bh = 0; bh < kBatch * kHeads; ++bh)
    for (int k = scale < 0 ? 0 : scale; k <= (scale < 0 ? static_cast<int>(kSchedule.size()) - 1 : scale); ++k)
      for (int token = 0; token < kSchedule[k].tokens(); ++token) {
        const int begin = scale < 0 ? first[k] : 0;
        const int place = TokenMap(kSchedule[k], order).place(token / kSchedule[k].w, token % kSchedule[k].w);
        std::copy_n(x.data<float>() + (bh * x.dim(2) + begin + token) * kDim, kDim,
                    out.data<float>() + (bh * x.dim(2) + begin + place) * kDim);
      }
  return out;
}

/// Tokens that lie in tiles: the same outputs at their places, and an observer that sees the same lists.
TEST_F(Runner, TheOrderOfTokensChangesNothing) {
  CslaAttention csla;
  csla.windows = {-1, -1, 1, 3, 5, 5};
  csla.sink_scales = 2;
  csla.group = {3, 5, 0};
  Cs4aAttention carried;
  carried.decision_scale = 4;
  carried.granularity = 2;
  carried.share = 0.15;
  carried.group = {3, 4, 0};
  carried.own_windows = {3};
  Cs4aAttention by_grid = carried;
  by_grid.carry = Cs4aAttention::Carry::grid;
  ProbeAttention probe;
  probe.stride = 4;
  probe.share = 0.08;
  probe.group = {3, 4, 0};
  probe.window = 3;
  constexpr TokenOrder kOrder{3, 4};
  const Scene fixed(7);  // numbers of which no two column sums are all but equal: either key could be chosen
  const std::vector<AttentionMethod> methods = {DenseAttention(), csla, carried, by_grid, probe};
  for (std::size_t m = 0; m < methods.size(); ++m) {
    const AttentionPlan plan{"x", {{0, -1, 4, -1, methods[m]}}};
    AttentionRunner rows(*backend, plan, kSchedule, 1), tiles(*backend, plan, kSchedule, 1, kOrder);
    std::vector<std::vector<KeyRun>> seen_by_rows, seen_by_tiles;
    rows.observe([&](int, int, const QueryTiles&, const KeyLists& lists) { seen_by_rows.push_back(lists.runs); });
    tiles.observe([&](int, int, const QueryTiles&, const KeyLists& lists) { seen_by_tiles.push_back(lists.runs); });
    for (const int k : {4, 5}) {
      AttentionArgs args = fixed.at(k), other = fixed.at(k);
      other.q = moved(args.q, kOrder, k);
      other.k = moved(args.k, kOrder);
      other.v = moved(args.v, kOrder);
      rows.run(0, k, args);
      tiles.run(0, k, other);
      const TokenMap map(kSchedule[k], kOrder);
      double worst = 0;
      for (int b = 0; b < kBatch; ++b)
        for (int token = 0; token < map.grid.tokens(); ++token)
          for (int i = 0; i < kHeads * kDim; ++i) {
            const std::int64_t place = map.place(token / map.grid.w, token % map.grid.w), n = map.grid.tokens();
            worst = std::max<double>(worst, std::abs(args.out.data<float>()[(b * n + token) * kHeads * kDim + i] -
                                                     other.out.data<float>()[(b * n + place) * kHeads * kDim + i]));
          }
      EXPECT_LT(worst, 3e-5) << "method " << m << ", scale " << k;
    }
    EXPECT_EQ(seen_by_rows, seen_by_tiles) << "method " << m;
    EXPECT_EQ(rows.share_of_pairs(5), tiles.share_of_pairs(5));
  }
}

}  // namespace
}  // namespace sparvar
