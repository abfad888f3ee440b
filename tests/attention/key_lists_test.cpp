#include "attention/key_lists.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <set>

#include "sparvar/error.h"

namespace sparvar {
namespace {

TEST(KeySet, EmitsSortedRunsWithoutDuplicates) {
  std::mt19937 random(std::random_device{}());
  for (const int keys : {1, 63, 64, 65, 200, 1000}) {
    KeySet set(keys);
    KeyLists lists;
    for (int round = 0; round < 20; ++round) {
      std::set<int> expected;
      for (int i = 0; i < round; ++i) {
        const int begin = static_cast<int>(random() % keys);
        const int count = static_cast<int>(random() % 130);
        set.add(begin, count);
        for (int key = begin; key < std::min(begin + count, keys); ++key) expected.insert(key);
      }
      const std::size_t first = lists.runs.size();
      set.flush(lists);
      std::set<int> found;
      int last_end = -1;
      for (std::size_t r = first; r < lists.runs.size(); ++r) {
        ASSERT_GT(lists.runs[r].begin, last_end) << "runs touch, overlap or are out of order";
        last_end = lists.runs[r].begin + lists.runs[r].count;
        for (int key = lists.runs[r].begin; key < last_end; ++key) found.insert(key);
      }
      ASSERT_EQ(found, expected) << keys << " keys, round " << round;
    }
    EXPECT_EQ(lists.offset.size(), 21U);
  }
}

TEST(KeySet, IgnoresKeysOutsideTheAxis) {
  KeySet set(70);
  KeyLists lists;
  set.add(-5, 7);
  set.add(68, 100);
  set.add(10, 0);
  set.flush(lists);
  EXPECT_EQ(lists.runs, (std::vector<KeyRun>{{0, 2}, {68, 2}}));
}

TEST(Tiles, CoverEveryQueryOnce) {
  for (const Grid grid : {Grid{1, 1}, Grid{7, 5}, Grid{64, 64}, Grid{111, 37}, Grid{40, 100}})
    for (const QueryGroup& group :
         {QueryGroup{8, 8, 0}, QueryGroup{8, 16, 0}, QueryGroup{3, 5, 0}, QueryGroup{1, 1, 192}, QueryGroup{1, 1, 1}}) {
      const QueryTiles tiles = group_tiles(grid, group);
      std::set<int> seen(tiles.rows.begin(), tiles.rows.end());
      EXPECT_EQ(tiles.rows.size(), static_cast<std::size_t>(grid.tokens()));
      EXPECT_EQ(seen.size(), tiles.rows.size());
      EXPECT_EQ(tiles.offset.back(), grid.tokens());
      for (int t = 0; t < tiles.count(); ++t) EXPECT_GT(tiles.rows_in(t), 0);
    }
}

TEST(BuildLists, KeepsTheOrderOfListsAndTiles) {
  const KeyLists lists = build_lists(3, 50, 200, [](int list, int tile, KeySet& set) {
    if (tile % 7 != 0) set.add(list * 60 + tile, 2);
  });
  ASSERT_EQ(lists.offset.size(), 151U);
  for (int list = 0; list < 3; ++list)
    for (int tile = 0; tile < 50; ++tile) {
      if (tile % 7 == 0) {
        EXPECT_EQ(lists.keys_in(list, tile), 0);
        continue;
      }
      EXPECT_EQ(lists.runs[lists.offset[list * 50 + tile]], (KeyRun{list * 60 + tile, 2}));
    }
}

TEST(ShareOfPairs, CountsQueriesTimesKeys) {
  QueryTiles tiles = row_tiles(10, 4);  // 4, 4, 2
  KeyLists lists;
  lists.tiles = 3;
  lists.runs = {{0, 10}, {5, 5}};
  lists.offset = {0, 1, 1, 2};
  EXPECT_DOUBLE_EQ(share_of_pairs(tiles, lists, 20), (4 * 10 + 2 * 5) / 200.0);
  EXPECT_DOUBLE_EQ(share_of_pairs(tiles, all_keys(tiles, 20), 20), 1.0);
}

TEST(KeyLists, UnsoundOnesAreRefused) {
  const QueryTiles tiles = row_tiles(10, 4);
  const KeyLists sound = build_lists(2, tiles.count(), 100, [](int list, int tile, KeySet& set) {
    set.add(10 * tile, 5);
    set.add(40 + list, 20);
  });
  EXPECT_NO_THROW(require_sound(tiles, sound));
  EXPECT_NO_THROW(require_sound(tiles, all_keys(tiles, 7)));
  const auto refused = [&](auto change) {
    QueryTiles t = tiles;
    KeyLists l = sound;
    change(t, l);
    EXPECT_THROW(require_sound(t, l), Error);
  };
  refused([](QueryTiles&, KeyLists& l) { l.runs[1] = l.runs[0]; });
  refused([](QueryTiles&, KeyLists& l) { std::swap(l.runs[0], l.runs[1]); });
  refused([](QueryTiles&, KeyLists& l) { l.runs[0].begin = -1; });
  refused([](QueryTiles&, KeyLists& l) { l.runs[3].count = -2; });
  refused([](QueryTiles&, KeyLists& l) { l.offset.back() += 1; });
  refused([](QueryTiles&, KeyLists& l) { l.offset.pop_back(); });
  refused([](QueryTiles&, KeyLists& l) { std::swap(l.offset[1], l.offset[2]); });
  refused([](QueryTiles&, KeyLists& l) { l.lists = 3; });
  refused([](QueryTiles&, KeyLists& l) { l.runs[0].count = std::numeric_limits<std::int32_t>::max(); });
  refused([](QueryTiles& t, KeyLists&) { t.rows[2] = -5; });
  refused([](QueryTiles& t, KeyLists&) { t.offset.back() = 99; });
  refused([](QueryTiles& t, KeyLists&) { t.offset.push_back(t.offset.back()); });
}

}  // namespace
}  // namespace sparvar
