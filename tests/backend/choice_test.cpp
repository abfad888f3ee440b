// Choosing keys as plans do, on the device under test: column sums, the largest of them, the lists made of a choice,
// and the dense attention of few queries that the choice begins with.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "attention/cs4a.h"
#include "backend/attention_reference.h"
#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "support.h"

namespace sparvar {
namespace {

struct Call {
  Tensor q, k;  // as the device has them, in f32
  AttentionArgs args;
};

Call make_call(DType type, int batch, int heads, int queries, int keys, int dim, unsigned seed) {
  Call call;
  const auto random = [&](Shape shape, unsigned offset, float size) {
    return testing::random_tensor(std::move(shape), seed + offset, size).to(type);
  };
  call.args = {.q = random({batch, heads, queries, dim}, 0, 1.5F),
               .k = random({batch, heads, keys + 5, dim}, 1, 1.5F),
               .v = random({batch, heads, keys + 5, dim}, 2, 1.0F),
               .out = Tensor::zeros(type, {batch, queries, heads, dim}),
               .scale = 0.3F,
               .statistics = Tensor::zeros(DType::f32, {batch, heads, queries, 2})};
  call.q = call.args.q.to(DType::f32);
  call.k = call.args.k.to(DType::f32);
  return call;
}

/// Logits of every key for one query, in double precision.
std::vector<double> logits_of(const Call& call, int bh, int query, int keys) {
  const std::int64_t dim = call.q.dim(3);
  std::vector<double> logits(keys);
  for (int key = 0; key < keys; ++key) {
    double logit = 0;
    for (std::int64_t d = 0; d < dim; ++d)
      logit += static_cast<double>(call.q.data<float>()[(bh * call.q.dim(2) + query) * dim + d]) *
               call.k.data<float>()[(bh * call.k.dim(2) + key) * dim + d];
    logits[key] = logit * call.args.scale;
  }
  return logits;
}

/// Probabilities of every key for one query.
std::vector<double> probabilities(const Call& call, int bh, int query, int keys) {
  std::vector<double> p = logits_of(call, bh, query, keys);
  const double largest = *std::max_element(p.begin(), p.end());
  double total = 0;
  for (double& x : p) total += x = std::exp(x - largest);
  for (double& x : p) x /= total;
  return p;
}

/// Groups of the sizes in turn, queries in an order of their own.
QueryTiles groups_of(int queries, const std::vector<int>& sizes) {
  QueryTiles groups;
  for (int i = 0; i < queries; ++i) groups.rows.push_back((i * 7 + 3) % queries);
  for (int at = 0, i = 0; at < queries; ++i) {
    at = std::min(queries, at + sizes[i % sizes.size()]);
    groups.offset.push_back(at);
  }
  return groups;
}

void check_column_sums(DType type, int dim, int queries, int keys, const std::vector<int>& sizes) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << name_of(type) << " dim " << dim << ", " << queries << " x " << keys
                                    << ", groups of " << sizes.front() << ", seed " << seed);
  constexpr int kBatch = 2, kHeads = 2;
  const auto backend = testing::make_backend(type);
  Call call = make_call(type, kBatch, kHeads, queries, keys, dim, seed);
  backend->dense_attention(call.args, keys);
  const QueryTiles groups = groups_of(queries, sizes);
  const Tensor sums = backend->column_sums(call.args, groups, keys);
  ASSERT_EQ(sums.shape(), (Shape{kBatch * kHeads, groups.count(), keys}));
  double worst = 0;
  for (int bh = 0; bh < kBatch * kHeads; ++bh)
    for (int g = 0; g < groups.count(); ++g) {
      std::vector<double> want(keys, 0.0);
      for (int r = groups.offset[g]; r < groups.offset[g + 1]; ++r) {
        const std::vector<double> p = probabilities(call, bh, groups.rows[r], keys);
        for (int key = 0; key < keys; ++key) want[key] += p[key];
      }
      const float* found = sums.data<float>() + (static_cast<std::int64_t>(bh) * groups.count() + g) * keys;
      for (int key = 0; key < keys; ++key) {
        const double difference = std::abs(found[key] - want[key]) / std::max(1.0, want[key]);
        if (!(difference <= worst)) worst = difference;
      }
    }
  EXPECT_LT(worst, type == DType::bf16 ? 5e-3 : 2e-5);
}

TEST(ColumnSums, MatchDoublePrecision) {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const int dim : {16, 64, 80, 96, 112, 128}) check_column_sums(type, dim, 150, 203, {64, 40});
    check_column_sums(type, 64, 64, 300, {1});
    check_column_sums(type, 128, 100, 129, {1});
    check_column_sums(type, 128, 400, 257, {192});
    check_column_sums(type, 64, 70, 65, {3, 1, 7});
    check_column_sums(type, 20, 33, 40, {5});
    check_column_sums(type, 64, 9, 1, {4});
  }
}

TEST(DenseAttention, OfFewQueriesAndManyKeysHasStatistics) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const int queries : {1, 64, 100}) {
      SCOPED_TRACE(::testing::Message() << name_of(type) << " " << queries);
      constexpr int kHeads = 3, kKeys = 3001, kDim = 64;
      const auto backend = testing::make_backend(type);
      Call call = make_call(type, 2, kHeads, queries, kKeys, kDim, std::random_device{}());
      backend->dense_attention(call.args, kKeys);
      const Tensor v = call.args.v.to(DType::f32), out = call.args.out.to(DType::f32);
      double worst = 0, worst_total = 0;
      for (int bh = 0; bh < 2 * kHeads; ++bh)
        for (int i = 0; i < queries; i += 7) {
          const KeyRun all{0, kKeys};
          const testing::Reference want =
              testing::attend(call.q.data<float>() + (static_cast<std::int64_t>(bh) * queries + i) * kDim,
                              call.k.data<float>() + bh * call.k.dim(2) * kDim, v.data<float>() + bh * v.dim(2) * kDim,
                              kDim, call.args.scale, &all, &all + 1);
          const float* found = out.data<float>() +
                               ((static_cast<std::int64_t>(bh / kHeads) * queries + i) * kHeads + bh % kHeads) * kDim;
          for (int d = 0; d < kDim; ++d) {
            const double difference = std::abs(found[d] - want.out[d]);
            if (!(difference <= worst)) worst = difference;
          }
          const float* statistics =
              call.args.statistics.data<float>() + (static_cast<std::int64_t>(bh) * queries + i) * 2;
          const double log_sum = want.largest + std::log(want.total);
          worst_total = std::max(worst_total, std::abs(statistics[0] + std::log(statistics[1]) - log_sum));
        }
      EXPECT_LT(worst, type == DType::bf16 ? 3e-2 : 5e-5);
      EXPECT_LT(worst_total, type == DType::bf16 ? 3e-3 : 5e-5);
    }
}

TEST(SelectKeys, TakesTheLargestAndOrdersThemByCount) {
  const auto backend = testing::make_backend(DType::f32);
  std::mt19937 random(std::random_device{}());
  for (const int keys : {1, 37, 256, 1000, 10521})
    for (const char* const kind : {"spread", "with ties", "close together, some far off"}) {
      SCOPED_TRACE(::testing::Message() << keys << ' ' << kind);
      Tensor sums = Tensor::empty(DType::f32, {3, 2, keys});
      for (std::int64_t i = 0; i < sums.size(); ++i) {
        const auto at_random = static_cast<float>(random() % 100000);
        sums.data<float>()[i] = kind[0] == 's'        ? std::exp(-at_random * 2e-4F)
                                : kind[0] == 'w'      ? std::fmod(at_random, 5.0F)
                                : random() % 100 == 0 ? -std::exp(at_random * 1e-4F)
                                                      : 1.0F + std::fmod(at_random, 500.0F) * 1.2e-7F;
      }
      sums.data<float>()[keys / 2] = std::numeric_limits<float>::quiet_NaN();
      if (keys > 2) sums.data<float>()[keys] = std::numeric_limits<float>::infinity();
      const int most = std::max(1, keys / 5);
      std::vector<int> counts{most};
      if (most > 6) counts.insert(counts.end(), {most - 1, most - 5});
      Tensor found = Tensor::zeros(DType::i32, {3, 2, most});
      backend->select_keys(sums, counts, found);
      for (int row = 0; row < 6; ++row)
        for (const int count : counts) {
          std::vector<std::int32_t> want(count);
          select_top(sums.data<float>() + static_cast<std::int64_t>(row) * keys, keys, count, want.data());
          std::vector<std::int32_t> got(found.data<std::int32_t>() + static_cast<std::int64_t>(row) * most,
                                        found.data<std::int32_t>() + static_cast<std::int64_t>(row) * most + count);
          std::sort(got.begin(), got.end());
          ASSERT_EQ(got, want) << "row " << row << ", " << count << " keys";
        }
    }
}

constexpr int kChoosingHeads = 2;

/// Two batch entries of kChoosingHeads heads, and a group for every query, but the first query for the last as well.
QueryTiles each_alone(int queries) {
  QueryTiles groups;
  for (int i = 0; i <= queries; ++i) {
    groups.rows.push_back(i % queries);
    groups.offset.push_back(i + 1);
  }
  return groups;
}

Tensor chosen_by(Backend& backend, AttentionArgs& args, const std::vector<std::int32_t>& rows, const QueryTiles& groups,
                 int keys, int count) {
  Tensor choice = Tensor::zeros(DType::i32, {args.q.dim(0) * args.q.dim(1), groups.count(), count});
  backend.attend_and_choose(args, rows, groups, keys, {count}, choice);
  return choice;
}

void check_choice(Backend& backend, Call& call, int keys, int count) {
  const int queries = static_cast<int>(call.q.dim(2));
  AttentionArgs dense = call.args;
  dense.out = Tensor::zeros(call.args.out.dtype(), call.args.out.shape());
  dense.statistics = Tensor::zeros(DType::f32, call.args.statistics.shape());
  backend.dense_attention(dense, keys);
  const QueryTiles groups = each_alone(queries);
  const Tensor choice = chosen_by(backend, call.args, {}, groups, keys, count);
  EXPECT_EQ(0, std::memcmp(dense.out.raw(), call.args.out.raw(), dense.out.bytes()));
  EXPECT_EQ(0, std::memcmp(dense.statistics.raw(), call.args.statistics.raw(), dense.statistics.bytes()));
  constexpr double kRounding = 1e-2;  // of probabilities, where the device chooses by them
  for (int bh = 0; bh < 2 * kChoosingHeads; ++bh)
    for (int g = 0; g < groups.count(); g += 3) {
      const std::vector<double> logits = logits_of(call, bh, groups.rows[g], keys);
      std::vector<double> sorted = logits;
      std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<>());
      const double least = sorted[count - 1];
      const std::int32_t* found = choice.data<std::int32_t>() + (std::int64_t{bh} * groups.count() + g) * count;
      std::vector<bool> chosen(keys, false);
      for (int i = 0; i < count; ++i) {
        ASSERT_TRUE(found[i] >= 0 && found[i] < keys && !chosen[found[i]]) << "entry " << i << " of group " << g;
        chosen[found[i]] = true;
      }
      for (int key = 0; key < keys; ++key)
        ASSERT_TRUE(chosen[key] ? logits[key] >= least - kRounding : logits[key] <= least + kRounding)
            << "group " << g << ", key " << key << " of logit " << logits[key] << ", the least is " << least;
    }
}

TEST(AttendAndChoose, TakesTheKeysOfTheLargestLogits) {
  struct Case {
    int queries, keys, dim, count;
  };
  for (const DType type : {DType::f32, DType::bf16})
    for (const Case& c :
         {Case{64, 1025, 64, 31}, Case{25, 1600, 80, 48}, Case{7, 1024, 96, 1}, Case{65, 2111, 112, 64},
          Case{36, 3001, 128, 316}, Case{3, 10521, 128, 316}, Case{1, 12288, 64, 640}, Case{2, 12289, 64, 100},
          Case{5, 1030, 64, 1030}, Case{9, 300, 128, 9}, Case{4, 1500, 24, 77}}) {
      const unsigned seed = std::random_device{}();
      SCOPED_TRACE(::testing::Message() << name_of(type) << " " << c.queries << " x " << c.keys << ", dim " << c.dim
                                        << ", " << c.count << " keys, seed " << seed);
      const auto backend = testing::make_backend(type);
      Call call = make_call(type, 2, kChoosingHeads, c.queries, c.keys, c.dim, seed);
      check_choice(*backend, call, c.keys, c.count);
    }
}

/// As if the rows had been gathered before.
TEST(AttendAndChoose, OfSomeRowsOfTheQueries) {
  for (const DType type : {DType::f32, DType::bf16}) {
    constexpr int kQueries = 90, kKeys = 1111, kDim = 80, kCount = 40;
    const std::vector<std::int32_t> rows{3, 89, 0, 17, 18, 60, 44};
    const auto count = static_cast<std::int64_t>(rows.size());
    SCOPED_TRACE(name_of(type));
    const auto backend = testing::make_backend(type);
    Call call = make_call(type, 2, kChoosingHeads, kQueries, kKeys, kDim, std::random_device{}());
    const auto with_results = [&](AttentionArgs args) {
      args.out = Tensor::zeros(type, {2, count, kChoosingHeads, kDim});
      args.statistics = Tensor::zeros(DType::f32, {2, kChoosingHeads, count, 2});
      return args;
    };
    AttentionArgs some = with_results(call.args), gathered = with_results(call.args);
    gathered.q = backend->gather_queries(call.args.q, rows);
    const QueryTiles groups = each_alone(static_cast<int>(count));
    const Tensor choice = chosen_by(*backend, some, rows, groups, kKeys, kCount);
    const Tensor want = chosen_by(*backend, gathered, {}, groups, kKeys, kCount);
    EXPECT_EQ(0, std::memcmp(choice.raw(), want.raw(), want.bytes()));
    EXPECT_EQ(0, std::memcmp(some.out.raw(), gathered.out.raw(), some.out.bytes()));
    EXPECT_EQ(0, std::memcmp(some.statistics.raw(), gathered.statistics.raw(), some.statistics.bytes()));
  }
}

TEST(MinusRows, IsTheDifference) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const std::int64_t width : {5, 24}) {
      const auto backend = testing::make_backend(type);
      const std::vector<std::int32_t> rows{9, 2, 2, 0};
      const Tensor x = testing::random_tensor({2, 4, 3, width}, 1).to(type),
                   of = testing::random_tensor({2, 10, 3, width}, 2).to(type);
      const Tensor found = backend->minus_rows(x, of, rows);
      ASSERT_EQ(found.shape(), x.shape());
      const Tensor xf = x.to(DType::f32), off = of.to(DType::f32), got = found.to(DType::f32);
      for (std::int64_t i = 0; i < x.size(); ++i) {
        const std::int64_t row = i / (3 * width), channel = i % (3 * width);
        const double want =
            xf.data<float>()[i] -
            static_cast<double>(off.data<float>()[(row / 4 * 10 + rows[row % 4]) * 3 * width + channel]);
        const bool rounds = found.dtype() == DType::bf16;
        EXPECT_NEAR(got.data<float>()[i], want, (rounds ? 0x1p-8 : 0x1p-22) * (std::abs(want) + 1e-3));
      }
    }
}

/// Large logits side by side: the bound of groups of keys then lets too many pass, and has to be raised.
TEST(AttendAndChoose, FindsKeysThatLieTogether) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const int count : {40, 316, 600}) {
      constexpr int kQueries = 8, kKeys = 3001, kDim = 64, kFrom = 500, kTo = 1700;
      SCOPED_TRACE(::testing::Message() << name_of(type) << " " << count);
      const auto backend = testing::make_backend(type);
      Call call = make_call(type, 2, kChoosingHeads, kQueries, kKeys, kDim, std::random_device{}());
      for (std::int64_t row = 0; row < call.q.size() / kDim; ++row) call.q.data<float>()[row * kDim] = 4;
      for (std::int64_t row = 0; row < call.k.size() / kDim; ++row) {
        const std::int64_t key = row % call.k.dim(2);
        call.k.data<float>()[row * kDim] = key >= kFrom && key < kTo ? 8 : 0;
      }
      call.args.q = call.q.to(type);
      call.args.k = call.k.to(type);
      check_choice(*backend, call, kKeys, count);
    }
}

/// Small whole numbers, whose products no order of sums rounds.
TEST(AttendAndChoose, OfEqualLogitsTakesTheLowerKeys) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const int values : {1, 5}) {
      constexpr int kQueries = 6, kKeys = 2999, kDim = 64, kCount = 450;
      SCOPED_TRACE(::testing::Message() << name_of(type) << " " << values);
      const auto backend = testing::make_backend(type);
      Call call = make_call(type, 2, kChoosingHeads, kQueries, kKeys, kDim, 1);
      for (std::int64_t i = 0; i < call.q.size(); ++i) call.q.data<float>()[i] = i % kDim == 0 ? 1 : 0;
      for (std::int64_t i = 0; i < call.k.size(); ++i)
        call.k.data<float>()[i] = static_cast<float>(i / kDim % call.k.dim(2) * 7 % values);
      call.args.scale = 1;
      call.args.q = call.q.to(type);
      call.args.k = call.k.to(type);
      const Tensor choice = chosen_by(*backend, call.args, {}, each_alone(kQueries), kKeys, kCount);
      std::vector<std::int32_t> want(kKeys);
      std::iota(want.begin(), want.end(), 0);
      std::stable_sort(want.begin(), want.end(), [&](int a, int b) { return a * 7 % values > b * 7 % values; });
      want.resize(kCount);
      std::sort(want.begin(), want.end());
      for (std::int64_t row = 0; row < choice.size() / kCount; ++row) {
        const std::int32_t* found = choice.data<std::int32_t>() + row * kCount;
        std::vector<std::int32_t> got(found, found + kCount);
        std::sort(got.begin(), got.end());
        ASSERT_EQ(got, want) << "row " << row;
      }
    }
}

TEST(AttentionRecipe, IsAttentionToTheListsThatFollowFromIt) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const bool mapped : {false, true}) {
      SCOPED_TRACE(::testing::Message() << name_of(type) << (mapped ? " mapped" : ""));
      constexpr int kBatch = 2, kHeads = 3, kQueries = 230, kKeys = 611, kGroups = 4, kPerGroup = 50;
      const auto backend = testing::make_backend(type);
      std::mt19937 random(std::random_device{}());
      Call call = make_call(type, kBatch, kHeads, kQueries, kKeys, 64, random());
      ListRecipe recipe{
          .tiles = row_tiles(kQueries, 64), .keys = kKeys, .chosen = 45, .group_of = {}, .map = {}, .fixed = {}};
      for (int t = 0; t < recipe.tiles.count(); ++t) recipe.group_of.push_back(t * 3 % kGroups);
      if (mapped)
        for (int key = 0; key < kKeys; ++key) recipe.map.push_back(key / 2 + 100);  // two to one
      recipe.fixed = build_lists(1, recipe.tiles.count(), kKeys, [](int, int tile, KeySet& set) {
        if (tile == 1) return;
        set.add(0, 21);
        set.add(400 + 10 * tile, 33);
      });
      Tensor choice = Tensor::empty(DType::i32, {kBatch * kHeads, kGroups, kPerGroup});
      for (std::int64_t i = 0; i < choice.size(); ++i)
        choice.data<std::int32_t>()[i] = static_cast<std::int32_t>(random() % kKeys);
      const KeyLists lists = follow(recipe, choice.data<std::int32_t>(), kBatch * kHeads, kGroups, kPerGroup);
      AttentionArgs want = call.args;
      want.out = Tensor::zeros(type, call.args.out.shape());
      backend->attention(want, recipe.tiles, lists);
      const AttentionRecipePtr prepared = backend->prepare_recipe(recipe);
      Tensor pairs = Tensor::zeros(DType::i64, {1});
      backend->attention(call.args, *prepared, choice, pairs);
      EXPECT_EQ(0, std::memcmp(want.out.raw(), call.args.out.raw(), want.out.bytes()));
      std::int64_t counted = 0;
      for (int l = 0; l < lists.lists; ++l)
        for (int t = 0; t < lists.tiles; ++t) counted += lists.keys_in(l, t) * recipe.tiles.rows_in(t);
      EXPECT_EQ(pairs.data<std::int64_t>()[0], counted);
      EXPECT_GT(counted, 0);
    }
}

TEST(AttentionRecipe, AddsAResizedResidualAsAStepOfItsOwnWould) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const int dim : {64, 80, 96, 112, 128})
      for (const int tile : {60, 128, 192}) {
        SCOPED_TRACE(::testing::Message() << name_of(type) << ", dim " << dim << ", tiles of " << tile);
        constexpr int kBatch = 2, kHeads = 3, kKeys = 411, kChosen = 70;
        constexpr Grid kFrom{9, 7}, kTo{17, 20};
        const auto backend = testing::make_backend(type);
        std::mt19937 random(std::random_device{}());
        Call call = make_call(type, kBatch, kHeads, kTo.h * kTo.w, kKeys, dim, random());
        ListRecipe recipe{.tiles = row_tiles(kTo.h * kTo.w, tile),
                          .keys = kKeys,
                          .chosen = kChosen,
                          .group_of = {},
                          .map = {},
                          .fixed = {}};
        for (int t = 0; t < recipe.tiles.count(); ++t) recipe.group_of.push_back(t);
        Tensor choice = Tensor::empty(DType::i32, {kBatch * kHeads, recipe.tiles.count(), kChosen});
        for (std::int64_t i = 0; i < choice.size(); ++i)
          choice.data<std::int32_t>()[i] = static_cast<std::int32_t>(random() % kKeys);
        const Tensor cache =
            testing::random_tensor({kBatch, kFrom.h * kFrom.w, kHeads, dim}, random()).to(backend->product_type());
        const AttentionRecipePtr prepared = backend->prepare_recipe(recipe);
        Tensor pairs = Tensor::zeros(DType::i64, {1});
        AttentionArgs want = call.args;
        want.out = Tensor::zeros(type, call.args.out.shape());
        backend->attention(want, *prepared, choice, pairs);
        backend->add_resized(want.out, cache, kFrom, kTo);
        backend->attention_with_residual(call.args, *prepared, choice, pairs, cache, kFrom, kTo);
        EXPECT_EQ(0, std::memcmp(want.out.raw(), call.args.out.raw(), want.out.bytes()));
      }
}

TEST(GatherQueries, TakesRowsOfEveryHead) {
  const auto backend = testing::make_backend(DType::bf16);
  const Tensor x = testing::random_tensor({2, 3, 17, 24}, 5).to(DType::bf16);
  const std::vector<std::int32_t> rows{16, 0, 5};
  const Tensor found = backend->gather_queries(x, rows);
  ASSERT_EQ(found.shape(), (Shape{2, 3, 3, 24}));
  for (int bh = 0; bh < 6; ++bh)
    for (int i = 0; i < 3; ++i)
      EXPECT_EQ(0, std::memcmp(found.data<BFloat16>() + (bh * 3 + i) * 24,
                               x.data<BFloat16>() + (bh * 17 + rows[i]) * 24, 48));
}

}  // namespace
}  // namespace sparvar
