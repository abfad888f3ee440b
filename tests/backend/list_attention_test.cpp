// Attention to lists of keys on the device under test, against plain double precision: in a call and in a program.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "backend/attention_reference.h"
#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "support.h"

namespace sparvar {
namespace {

struct Case {
  DType type;
  int batch, heads, queries, keys, dim;
  int tile;             // queries a tile
  int every;            // keys kept: a run of at most 3 in `every`; 0: all, -1: none
  bool own_lists;       // per head
  int check_every = 1;  // rows compared
  int box = 0;          // not 0: every second box of so many keys instead
};

KeyLists make_lists(const Case& c, int tiles) {
  KeyLists lists;
  lists.lists = c.own_lists ? c.batch * c.heads : 1;
  lists.tiles = tiles;
  for (int l = 0; l < lists.lists; ++l)
    for (int t = 0; t < tiles; ++t) {
      if (c.box > 0) {
        if (t % 3 != 2)
          for (int key = (l + t) % 2 * c.box; key < c.keys; key += 2 * c.box)
            lists.runs.push_back({key, std::min(c.box, c.keys - key)});
      } else if (c.every == 0) {
        lists.runs.push_back({0, c.keys});
      }
      if (c.box == 0 && c.every > 0 && t % 3 != 2)  // every third list is empty
        for (int key = (l + t) % c.every; key < c.keys; key += c.every)
          lists.runs.push_back({key, std::min({3, c.every - 1, c.keys - key})});
      lists.offset.push_back(static_cast<std::int64_t>(lists.runs.size()));
    }
  return lists;
}

/// Queries in an order of their own; the last one is in no tile.
QueryTiles make_tiles(const Case& c) {
  QueryTiles tiles;
  for (int q = 0; q + 1 < c.queries; ++q) tiles.rows.push_back(c.queries - 2 - q);
  for (int q = 0; q + 1 < c.queries; q += c.tile) tiles.offset.push_back(std::min(q + c.tile, c.queries - 1));
  return tiles;
}

constexpr float kUntouched = 7.0F;

void check(const Case& c, const AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) {
  const Tensor q = args.q.to(DType::f32), k = args.k.to(DType::f32), v = args.v.to(DType::f32),
               out = args.out.to(DType::f32);
  const std::int64_t capacity = args.k.dim(2);
  double worst = 0, worst_total = 0;
  for (int bh = 0; bh < c.batch * c.heads; ++bh) {
    const auto found = [&](int row) {
      return out.data<float>() +
             ((static_cast<std::int64_t>(bh / c.heads) * c.queries + row) * c.heads + bh % c.heads) * c.dim;
    };
    for (int t = 0; t < tiles.count(); ++t)
      for (int r = tiles.offset[t]; r < tiles.offset[t + 1]; ++r) {
        const int row = tiles.rows[r];
        if (row % c.check_every != 0) continue;
        const std::int64_t list = (c.own_lists ? bh : 0) * tiles.count() + t;
        const testing::Reference want =
            testing::attend(q.data<float>() + (bh * c.queries + row) * c.dim, k.data<float>() + bh * capacity * c.dim,
                            v.data<float>() + bh * capacity * c.dim, c.dim, args.scale,
                            lists.runs.data() + lists.offset[list], lists.runs.data() + lists.offset[list + 1]);
        for (int d = 0; d < c.dim; ++d) {
          const double difference = std::abs(found(row)[d] - want.out[d]);
          if (!(difference <= worst)) worst = difference;
        }
        const float* statistics = args.statistics.data<float>() + (bh * c.queries + row) * 2;
        if (want.total == 0) {
          EXPECT_EQ(statistics[1], 0.0F);
          continue;
        }
        const double log_sum = want.largest + std::log(want.total);
        worst_total = std::max(worst_total, std::abs(statistics[0] + std::log(statistics[1]) - log_sum));
      }
    for (int d = 0; d < c.dim; ++d) EXPECT_EQ(found(c.queries - 1)[d], kUntouched);
  }
  EXPECT_LT(worst, c.type == DType::bf16 ? 3e-2 : 5e-5);
  EXPECT_LT(worst_total, c.type == DType::bf16 ? 3e-3 : 1e-4);
}

void run(const Case& c) {
  SCOPED_TRACE(::testing::Message() << name_of(c.type) << " " << c.queries << " x " << c.keys << ", dim " << c.dim
                                    << ", tiles of " << c.tile << ", every " << c.every << ", boxes of " << c.box);
  const auto backend = testing::make_backend(c.type);
  const int capacity = c.keys + 3;
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  const auto random = [&](Shape shape, unsigned offset, float size) {
    return testing::random_tensor(std::move(shape), seed + offset, size).to(c.type);
  };
  const auto make_args = [&] {
    Tensor out = Tensor::empty(DType::f32, {c.batch, c.queries, c.heads, c.dim});
    std::fill_n(out.data<float>(), out.size(), kUntouched);
    const auto cache = [&](unsigned offset, float size) {  // what lies behind the keys is nobody's
      Tensor x = testing::random_tensor({c.batch, c.heads, capacity, c.dim}, seed + offset, size);
      for (int bh = 0; bh < c.batch * c.heads; ++bh)
        std::fill_n(x.data<float>() + (std::int64_t{bh} * capacity + c.keys) * c.dim, (capacity - c.keys) * c.dim,
                    std::nanf(""));
      return x.to(c.type);
    };
    return AttentionArgs{.q = random({c.batch, c.heads, c.queries, c.dim}, 0, 1.5F),
                         .k = cache(1, 1.5F),
                         .v = cache(2, 1.0F),
                         .out = out.to(c.type),
                         .scale = 0.4F,
                         .statistics = Tensor::zeros(DType::f32, {c.batch, c.heads, c.queries, 2})};
  };
  const QueryTiles tiles = make_tiles(c);
  const KeyLists lists = make_lists(c, tiles.count());
  AttentionArgs args = make_args();
  backend->attention(args, tiles, lists);
  check(c, args, tiles, lists);
  AttentionArgs again = make_args();
  const AttentionListsPtr prepared = backend->prepare_lists(tiles, lists);
  backend->attention(again, *prepared);
  EXPECT_EQ(0, std::memcmp(args.out.raw(), again.out.raw(), args.out.bytes()));
}

TEST(ListAttention, MatchesDoublePrecision) {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const int dim : {16, 20, 40, 64, 80, 96, 112, 128}) run({type, 1, 2, 37, 201, dim, 16, 0, false});
    run({type, 2, 3, 130, 515, 64, 64, 7, true});
    run({type, 1, 1, 300, 333, 128, 192, 4, false});  // tiles larger than a kernel's
    run({type, 1, 2, 2, 1, 32, 64, 0, false});
    run({type, 1, 2, 65, 63, 33, 64, 2, true});  // a head dimension of no use to tensor cores
    run({type, 1, 1, 9, 50, 48, 4, -1, false});  // empty lists
    run({type, 2, 2, 129, 64, 96, 128, 0, false});
    for (const int dim : {64, 80, 96, 112, 128})
      for (const int tile : {50, 64, 100, 128, 192}) run({type, 2, 3, 410, 700, dim, tile, 5, tile % 4 == 0, 7});
    run({type, 2, 8, 1500, 900, 128, 64, 3, true, 41});  // more tiles than a GPU has room for
    run({type, 2, 8, 1500, 900, 128, 24, 3, true, 41});
    run({type, 1, 2, 700, 2901, 128, 128, 0, false, 13});  // long lists
    run({type, 1, 2, 700, 2901, 64, 128, 2, true, 13});
  }
}

TEST(ListAttention, OfKeysInARow) {
  for (const int dim : {64, 80, 96, 112, 128})
    for (const int tile : {64, 100, 192})
      for (const int box : {64, 128}) run({DType::bf16, 1, 3, 410, 700, dim, tile, 0, tile != 100, 23, box});
  run({DType::f32, 1, 3, 410, 700, 64, 100, 0, true, 23, 128});
  run({DType::bf16, 2, 8, 1500, 1025, 128, 128, 0, true, 41, 128});
  run({DType::bf16, 2, 8, 1500, 128, 64, 64, 0, false, 41});
}

TEST(ListAttention, RefusesListsThatDoNotFit) {
  const auto backend = testing::make_backend(DType::f32);
  const Case c{DType::f32, 1, 1, 8, 16, 32, 4, 0, false};
  const QueryTiles tiles = make_tiles(c);
  const AttentionListsPtr lists = backend->prepare_lists(tiles, make_lists(c, tiles.count()));
  AttentionArgs args{.q = testing::random_tensor({1, 1, 8, 32}, 1),
                     .k = testing::random_tensor({1, 1, 12, 32}, 2),
                     .v = testing::random_tensor({1, 1, 12, 32}, 3),
                     .out = Tensor::zeros(DType::f32, {1, 8, 1, 32}),
                     .scale = 1.0F,
                     .statistics = {}};
  EXPECT_THROW(backend->attention(args, *lists), Error);  // 16 keys, a cache of 12
}

}  // namespace
}  // namespace sparvar
