// The tile kernels of every instruction set against plain double precision.
#include <gtest/gtest.h>

#include "backend/attention_reference.h"
#include "backend/backend.h"
#include "backend/cpu/attention/kernels.h"
#include "support.h"

namespace sparvar {
namespace {

struct Case {
  const char* isa;
  DType type;
  int batch, heads, queries, keys, dim;
  int tile;        // queries a tile
  int every;       // keys kept: one run of 3 in `every`; 0: all, -1: none
  bool own_lists;  // per head
};

std::string name_case(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  std::string isa = c.isa;
  std::replace(isa.begin(), isa.end(), '-', '_');
  return isa + "_" + name_of(c.type) + "_q" + std::to_string(c.queries) + "_k" + std::to_string(c.keys) + "_d" +
         std::to_string(c.dim) + "_t" + std::to_string(c.tile) +
         (c.every < 0 ? "_empty" : "_e" + std::to_string(c.every)) + (c.own_lists ? "_own" : "");
}

KeyLists make_lists(const Case& c, int tiles) {
  KeyLists lists;
  lists.lists = c.own_lists ? c.batch * c.heads : 1;
  lists.tiles = tiles;
  for (int l = 0; l < lists.lists; ++l)
    for (int t = 0; t < tiles; ++t) {
      if (c.every == 0) lists.runs.push_back({0, c.keys});
      if (c.every > 0)
        for (int key = (l + t) % c.every; key < c.keys; key += c.every)
          lists.runs.push_back({key, std::min({3, c.every - 1, c.keys - key})});
      lists.offset.push_back(static_cast<std::int64_t>(lists.runs.size()));
    }
  return lists;
}

class Attention : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!select_attention_kernels(GetParam().isa)) GTEST_SKIP() << "this machine has no " << GetParam().isa;
  }
  void TearDown() override { select_attention_kernels(""); }
};

TEST_P(Attention, MatchesDoublePrecision) {
  const Case c = GetParam();
  const bool bf16 = c.type == DType::bf16;
  const auto backend = make_cpu_backend({.compute = c.type, .threads = 2});
  const int capacity = c.keys + 3;
  const auto rounded = [&](const Tensor& x) { return x.to(c.type); };
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  AttentionArgs args{.q = rounded(testing::random_tensor({c.batch, c.heads, c.queries, c.dim}, seed, 1.5F)),
                     .k = rounded(testing::random_tensor({c.batch, c.heads, capacity, c.dim}, seed + 1, 1.5F)),
                     .v = rounded(testing::random_tensor({c.batch, c.heads, capacity, c.dim}, seed + 2)),
                     .out = Tensor::zeros(c.type, {c.batch, c.queries, c.heads, c.dim}),
                     .scale = 0.4F,
                     .statistics = Tensor::zeros(DType::f32, {c.batch, c.heads, c.queries, 2})};
  QueryTiles tiles;
  for (int q = 0; q < c.queries; ++q) tiles.rows.push_back(c.queries - 1 - q);  // any order
  for (int q = 0; q < c.queries; q += c.tile) tiles.offset.push_back(std::min(q + c.tile, c.queries));
  const KeyLists lists = make_lists(c, tiles.count());
  backend->attention(args, tiles, lists);

  const Tensor q = args.q.to(DType::f32), k = args.k.to(DType::f32), v = args.v.to(DType::f32),
               out = args.out.to(DType::f32);
  double worst = 0, worst_total = 0;
  for (int bh = 0; bh < c.batch * c.heads; ++bh)
    for (int t = 0; t < tiles.count(); ++t)
      for (int r = tiles.offset[t]; r < tiles.offset[t + 1]; ++r) {
        const int row = tiles.rows[r];
        const std::int64_t list = (c.own_lists ? bh : 0) * tiles.count() + t;
        const testing::Reference want =
            testing::attend(q.data<float>() + (bh * c.queries + row) * c.dim, k.data<float>() + bh * capacity * c.dim,
                            v.data<float>() + bh * capacity * c.dim, c.dim, args.scale,
                            lists.runs.data() + lists.offset[list], lists.runs.data() + lists.offset[list + 1]);
        const std::int64_t at = (static_cast<std::int64_t>(bh / c.heads) * c.queries + row) * c.heads + bh % c.heads;
        for (int d = 0; d < c.dim; ++d) {
          const double difference = std::abs(out.data<float>()[at * c.dim + d] - want.out[d]);
          if (!(difference <= worst)) worst = difference;
        }
        const float* found = args.statistics.data<float>() + (bh * c.queries + row) * 2;
        if (c.every >= 0) {
          EXPECT_NEAR(found[0], want.largest, bf16 ? 2e-3 : 1e-4);
          worst_total = std::max(worst_total, std::abs(found[1] / want.total - 1));
        } else {
          EXPECT_EQ(found[1], 0.0F);
        }
      }
  EXPECT_LT(worst, bf16 ? 3e-2 : 5e-5);
  EXPECT_LT(worst_total, bf16 ? 1e-3 : 5e-5);
}

TEST_P(Attention, ColumnSumsMatchDoublePrecision) {
  const Case c = GetParam();
  if (c.every != 0) return;  // column sums are taken over all keys
  const auto backend = make_cpu_backend({.compute = c.type, .threads = 2});
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  AttentionArgs args{.q = testing::random_tensor({c.batch, c.heads, c.queries, c.dim}, seed, 1.5F).to(c.type),
                     .k = testing::random_tensor({c.batch, c.heads, c.keys, c.dim}, seed + 1, 1.5F).to(c.type),
                     .v = testing::random_tensor({c.batch, c.heads, c.keys, c.dim}, seed + 2).to(c.type),
                     .out = Tensor::zeros(c.type, {c.batch, c.queries, c.heads, c.dim}),
                     .scale = 0.4F,
                     .statistics = Tensor::zeros(DType::f32, {c.batch, c.heads, c.queries, 2})};
  QueryTiles groups;
  for (int q = 0; q < c.queries; ++q) groups.rows.push_back(q);
  for (int q = 0; q < c.queries; q += c.tile) groups.offset.push_back(std::min(q + c.tile, c.queries));
  groups.offset.push_back(c.queries);  // a group without queries
  QueryTiles all = groups;
  all.offset.pop_back();
  backend->attention(args, all, make_lists(c, all.count()));
  const Tensor sums = backend->column_sums(args, groups, c.keys);
  ASSERT_EQ(sums.shape(), (Shape{c.batch * c.heads, groups.count(), c.keys}));

  const Tensor q = args.q.to(DType::f32), k = args.k.to(DType::f32);
  double worst = 0;
  for (int bh = 0; bh < c.batch * c.heads; ++bh)
    for (int g = 0; g < groups.count(); ++g) {
      std::vector<double> want(c.keys, 0.0);
      for (int r = groups.offset[g]; r < groups.offset[g + 1]; ++r) {
        std::vector<double> logits(c.keys, 0.0);
        for (int key = 0; key < c.keys; ++key)
          for (int d = 0; d < c.dim; ++d)
            logits[key] += static_cast<double>(q.data<float>()[(bh * c.queries + r) * c.dim + d]) *
                           k.data<float>()[(bh * c.keys + key) * c.dim + d] * args.scale;
        const double largest = *std::max_element(logits.begin(), logits.end());
        double total = 0;
        for (const double x : logits) total += std::exp(x - largest);
        for (int key = 0; key < c.keys; ++key) want[key] += std::exp(logits[key] - largest) / total;
      }
      for (int key = 0; key < c.keys; ++key)
        worst = std::max(
            worst, std::abs(want[key] -
                            sums.data<float>()[(static_cast<std::int64_t>(bh) * groups.count() + g) * c.keys + key]));
    }
  EXPECT_LT(worst, c.type == DType::bf16 ? 5e-3 : 2e-5);
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512-bf16"})
    for (const DType type : {DType::f32, DType::bf16}) {
      for (const int dim : {16, 20, 40, 64, 80, 96, 112, 128})
        out.push_back({isa, type, 1, 2, 37, 201, dim, 16, 0, false});
      out.push_back({isa, type, 2, 3, 130, 515, 64, 64, 7, true});
      out.push_back({isa, type, 1, 1, 200, 333, 64, 192, 4, false});  // tiles larger than the kernel's
      out.push_back({isa, type, 1, 2, 1, 1, 32, 64, 0, false});
      out.push_back({isa, type, 1, 2, 65, 63, 33, 64, 2, true});  // odd head dim
      out.push_back({isa, type, 1, 1, 9, 50, 48, 4, -1, false});  // empty lists
    }
  return out;
}

INSTANTIATE_TEST_SUITE_P(Kernels, Attention, ::testing::ValuesIn(cases()), name_case);

}  // namespace
}  // namespace sparvar
