// The authors' mask is compared by the conformance program; here the properties that hold for every ratio and setting.
#include "attention/csla.h"

#include <gtest/gtest.h>

#include <set>

#include "core/resolutions.h"

namespace sparvar {
namespace {

std::set<int> keys_of(const KeyLists& lists, int tile) {
  std::set<int> keys;
  for (std::int64_t r = lists.offset[tile]; r < lists.offset[tile + 1]; ++r)
    for (int i = 0; i < lists.runs[r].count; ++i) keys.insert(lists.runs[r].begin + i);
  return keys;
}

TEST(Csla, TileListsAreTheUnionOfTheirQueries) {
  for (const Resolution& resolution : resolutions_1m())
    for (const auto centre : {CslaAttention::Centre::published, CslaAttention::Centre::half_pixel}) {
      const ScaleSchedule& schedule = resolution.schedule;
      CslaAttention single;
      single.centre = centre;
      single.group = {1, 1, 1};
      CslaAttention tiled = single;
      tiled.group = {3, 7, 0};
      const int k = 10;
      const QueryTiles queries = csla_tiles(schedule[k], single);
      const KeyLists each = csla_lists(schedule, k, single, queries);
      const QueryTiles tiles = csla_tiles(schedule[k], tiled);
      const KeyLists lists = csla_lists(schedule, k, tiled, tiles);
      for (int t = 0; t < tiles.count(); t += 5) {
        std::set<int> expected;
        for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i) expected.merge(keys_of(each, tiles.rows[i]));
        ASSERT_EQ(keys_of(lists, t), expected) << "ratio " << resolution.ratio << ", tile " << t;
      }
    }
}

TEST(Csla, EveryQuerySeesSinksAndItself) {
  for (const Resolution& resolution : resolutions_1m()) {
    const ScaleSchedule& schedule = resolution.schedule;
    CslaAttention method;
    method.group = {1, 1, 1};
    for (const int k : {10, 11, 12}) {
      const std::vector<int> first = first_keys(schedule, k);
      const QueryTiles tiles = csla_tiles(schedule[k], method);
      const KeyLists lists = csla_lists(schedule, k, method, tiles);
      for (int q = 0; q < tiles.count(); q += 37) {
        const std::set<int> keys = keys_of(lists, q);
        for (int sink = 0; sink < first[5]; ++sink) ASSERT_TRUE(keys.contains(sink));
        ASSERT_TRUE(keys.contains(first[k] + q)) << "ratio " << resolution.ratio << ", query " << q;
        ASSERT_LT(*keys.rbegin(), first.back());
      }
    }
  }
}

TEST(Csla, HalfPixelCentresStayInsideTheGrid) {
  for (int size = 1; size < 40; ++size)
    for (int keys = 1; keys < 40; ++keys)
      for (int y = 0; y < size; ++y) {
        const Bounds b = window_bounds(y, size, keys, 1, CslaAttention::Centre::half_pixel);
        ASSERT_EQ(b.end - b.begin, 1) << y << " of " << size << " on " << keys;
      }
}

TEST(Csla, NoWindowSeesNothing) {
  EXPECT_EQ(window_bounds(3, 8, 8, -1, CslaAttention::Centre::published), Bounds{});
  EXPECT_EQ(window_bounds(3, 8, 8, 0, CslaAttention::Centre::published), Bounds{});
  EXPECT_EQ(window_bounds(3, 8, 8, 3, CslaAttention::Centre::published), (Bounds{2, 5}));
}

TEST(Csla, BlocksCoverTheExactLists) {
  const ScaleSchedule& schedule = *schedule_1m(1.5);
  CslaAttention exact;
  exact.group = {1, 1, 128};
  CslaAttention blocks;
  blocks.form = CslaAttention::Form::blocks;
  const QueryTiles tiles = csla_tiles(schedule[11], blocks);
  const KeyLists whole = csla_lists(schedule, 11, blocks, tiles);
  const KeyLists fine = csla_lists(schedule, 11, exact, csla_tiles(schedule[11], exact));
  const int keys = first_keys(schedule, 11).back();
  for (int t = 0; t < tiles.count(); ++t) {
    std::set<int> expected;
    for (const int key : keys_of(fine, t))
      for (int i = key / 128 * 128; i < std::min(key / 128 * 128 + 128, keys); ++i) expected.insert(i);
    ASSERT_EQ(keys_of(whole, t), expected);
  }
}

}  // namespace
}  // namespace sparvar
