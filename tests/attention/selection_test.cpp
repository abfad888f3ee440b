// Selection of keys, carrying them, probes: against plain code on random sums, and properties on every aspect ratio.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "attention/probe.h"
#include "core/resolutions.h"

namespace sparvar {
namespace {

std::vector<float> random_sums(std::size_t count, bool with_ties) {
  std::mt19937 random(std::random_device{}());
  std::vector<float> sums(count);
  for (float& x : sums)
    x = with_ties ? static_cast<float>(random() % 7) / 3.0F - 1.0F
                  : std::uniform_real_distribution<float>(-1, 1)(random);
  return sums;
}

TEST(SelectTop, MatchesASort) {
  for (const bool ties : {false, true})
    for (const int keys : {1, 5, 121, 4121}) {
      const std::vector<float> sums = random_sums(keys, ties);
      std::vector<int> order(keys);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sums[a] > sums[b]; });
      for (const int count : {1, keys / 5 + 1, keys}) {
        std::vector<std::int32_t> found(count);
        select_top(sums.data(), keys, count, found.data());
        std::vector<int> expected(order.begin(), order.begin() + count);
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(std::vector<int>(found.begin(), found.end()), expected) << keys << " keys, " << count << " kept";
      }
    }
}

TEST(SelectTop, NanIsNeverChosenBeforeANumber) {
  const float sums[] = {NAN, -INFINITY, 2, NAN, -3, INFINITY};
  std::int32_t found[4];
  select_top(sums, 6, 4, found);
  EXPECT_EQ(std::vector<int>(found, found + 4), (std::vector<int>{1, 2, 4, 5}));
}

TEST(KeptKeys, IsAMultipleWithinBounds) {
  EXPECT_EQ(kept_keys(0.2, 121, 8), 24);
  EXPECT_EQ(kept_keys(0.2, 4121, 64), 832);
  EXPECT_EQ(kept_keys(0.0001, 121, 8), 8);
  EXPECT_EQ(kept_keys(1.0, 121, 64), 121);
}

/// Sorted runs, no overlap, all below `keys`; returns the keys of each list.
std::vector<std::set<int>> checked(const KeyLists& lists, int keys) {
  std::vector<std::set<int>> out;
  for (int i = 0; i < lists.lists * lists.tiles; ++i) {
    std::set<int> set;
    for (std::int64_t r = lists.offset[i]; r < lists.offset[i + 1]; ++r) {
      EXPECT_GT(lists.runs[r].count, 0);
      EXPECT_LE(lists.runs[r].begin + lists.runs[r].count, keys);
      for (int j = 0; j < lists.runs[r].count; ++j)
        EXPECT_TRUE(set.insert(lists.runs[r].begin + j).second) << "a key twice";
    }
    out.push_back(std::move(set));
  }
  return out;
}

TEST(CarryKeys, EveryFormOnEveryRatio) {
  for (const Resolution& resolution : resolutions_1m())
    for (const auto carry : {Cs4aAttention::Carry::ratio, Cs4aAttention::Carry::group, Cs4aAttention::Carry::grid})
      for (const QueryGroup& group : {QueryGroup{8, 8, 0}, QueryGroup{5, 11, 0}, QueryGroup{8, 8, 192}}) {
        const ScaleSchedule& schedule = resolution.schedule;
        Cs4aAttention method;
        method.carry = carry;
        method.group = group;
        method.decision_scale = 8;
        method.share = 0.1;
        const int keys_s = first_keys(schedule, 8).back();
        const int groups = group_tiles(schedule[8], group).count();
        const int count = kept_keys(method.share, keys_s, method.granularity);
        const std::vector<float> sums = random_sums(static_cast<std::size_t>(2) * groups * keys_s, false);
        const Selection selection = select_keys(sums.data(), 2, groups, keys_s, count);
        for (const int k : {9, 10}) {
          const QueryTiles tiles = group_tiles(schedule[k], group);
          const KeyLists lists = carry_keys(method, schedule, k, tiles, selection);
          ASSERT_EQ(lists.tiles, tiles.count());
          ASSERT_EQ(lists.lists, 2);
          const auto sets = checked(lists, first_keys(schedule, k).back());
          const int first = first_keys(schedule, k)[k];
          if (group.rows > 0) continue;
          for (int t = 0; t < tiles.count(); ++t)  // the own-scale window reaches each query itself
            for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i)
              ASSERT_TRUE(sets[t].contains(first + tiles.rows[i])) << "ratio " << resolution.ratio;
        }
      }
}

TEST(CarryKeys, ByGridKeepsThePlace) {
  const ScaleSchedule& schedule = *schedule_1m(1.0);
  // Row 5, column 9 of the 20x20 scale 7 -> the 24x24 scale 8.
  EXPECT_EQ(carry_by_grid(first_keys(schedule, 7)[7] + 5 * 20 + 9, schedule, 11, 10),
            first_keys(schedule, 8)[8] + 5 * 24 / 20 * 24 + 9 * 24 / 20);
  EXPECT_EQ(carry_by_ratio(100, 6425, 4121), 6425 * 100 / 4121);
}

TEST(ProbeLayout, EveryTileHasAChooser) {
  for (const Resolution& resolution : resolutions_1m())
    for (const int stride : {1, 3, 8, 100}) {
      ProbeAttention method;
      method.stride = stride;
      const Grid grid = resolution.schedule[10];
      const ProbeLayout layout = probe_layout(grid, method);
      EXPECT_EQ(layout.probe_rows.size(), static_cast<std::size_t>(layout.probe_grid.tokens()));
      EXPECT_EQ(std::set<int>(layout.probe_rows.begin(), layout.probe_rows.end()).size(), layout.probe_rows.size());
      EXPECT_LT(*std::max_element(layout.probe_rows.begin(), layout.probe_rows.end()), grid.tokens());
      ASSERT_EQ(layout.choosers.count(), layout.tiles.count());
      for (int t = 0; t < layout.choosers.count(); ++t) ASSERT_GT(layout.choosers.rows_in(t), 0);
    }
}

TEST(ProbeLists, HoldTheTopKeysAndTheWindow) {
  const ScaleSchedule& schedule = *schedule_1m(0.666);
  ProbeAttention method;
  method.share = 0.05;
  const int k = 9;
  const ProbeLayout layout = probe_layout(schedule[k], method);
  const int keys = first_keys(schedule, k).back();
  const int tiles = layout.tiles.count();
  const std::vector<float> sums = random_sums(static_cast<std::size_t>(3) * tiles * keys, false);
  const ListRecipe recipe = probe_recipe(schedule, k, method, layout);
  const Selection choice = select_keys(sums.data(), 3, tiles, recipe.keys, recipe.chosen);
  const KeyLists lists = follow(recipe, choice.keys.data(), 3, tiles, recipe.chosen);
  const auto sets = checked(lists, keys);
  const int count = kept_keys(method.share, keys, 1);
  for (int list = 0; list < 3; ++list)
    for (int t = 0; t < tiles; ++t) {
      const std::set<int>& set = sets[list * tiles + t];
      std::vector<std::int32_t> top(count);
      select_top(sums.data() + static_cast<std::size_t>(list * tiles + t) * keys, keys, count, top.data());
      for (const int key : top) ASSERT_TRUE(set.contains(key));
      for (int i = layout.tiles.offset[t]; i < layout.tiles.offset[t + 1]; ++i)
        ASSERT_TRUE(set.contains(first_keys(schedule, k)[k] + layout.tiles.rows[i]));
    }
}

}  // namespace
}  // namespace sparvar
