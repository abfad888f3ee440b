#include "attention/token_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "attention/cs4a.h"
#include "attention/csla.h"

namespace sparvar {
namespace {

const ScaleSchedule kSchedule = {{1, 1}, {2, 2}, {3, 4}, {5, 7}, {8, 11}, {12, 16}};
constexpr TokenOrder kOrder{3, 4};

TEST(TokenMap, TilesLieOneAfterTheOther) {
  for (const Grid grid : {Grid{12, 16}, Grid{5, 7}, Grid{7, 5}, Grid{3, 4}, Grid{1, 9}, Grid{9, 1}})
    for (const TokenOrder order : {TokenOrder{3, 4}, TokenOrder{2, 2}, TokenOrder{1, 3}, TokenOrder{8, 16}}) {
      const TokenMap map(grid, order);
      const QueryTiles tiles = grid_tiles(grid, order.tile_h, order.tile_w);
      for (std::size_t place = 0; place < tiles.rows.size(); ++place)
        EXPECT_EQ(map.place(tiles.rows[place] / grid.w, tiles.rows[place] % grid.w), place)
            << grid.h << "x" << grid.w << " in " << order.tile_h << "x" << order.tile_w;
      if (map.by_rows())
        EXPECT_TRUE(tokens_by_place(map).empty());
      else
        EXPECT_EQ(tokens_by_place(map), tiles.rows);
    }
}

TEST(TokenMap, AGridAloneLiesRowByRow) {
  const TokenMap map = Grid{4, 5};
  EXPECT_TRUE(map.by_rows());
  EXPECT_EQ(map.place(2, 3), 13);
  EXPECT_TRUE(places_of_tokens(map).empty());
}

std::set<int> keys_of(const KeyLists& lists, int list, int tile) {
  std::set<int> out;
  const std::int64_t at = std::int64_t{list} * lists.tiles + tile;
  for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
    for (int i = 0; i < lists.runs[r].count; ++i) out.insert(lists.runs[r].begin + i);
  return out;
}

/// The place of a key, worked out from its scale.
int place_of_key(int key) {
  int scale = 0;
  const std::vector<int> first = first_keys(kSchedule, static_cast<int>(kSchedule.size()) - 1);
  while (key >= first[scale + 1]) ++scale;
  const int token = key - first[scale], width = kSchedule[scale].w;
  return first[scale] + TokenMap(kSchedule[scale], kOrder).place(token / width, token % width);
}

std::set<int> places_of(const std::set<int>& keys) {
  std::set<int> out;
  for (const int key : keys) out.insert(place_of_key(key));
  return out;
}

TEST(KeyPlaces, ListsMoveAndComeBack) {
  CslaAttention csla;
  csla.windows = {-1, -1, 1, 3, 5, 5};
  csla.sink_scales = 2;
  csla.group = {3, 5, 0};
  const KeyPlaces places(kSchedule, kOrder);
  const QueryTiles tiles = csla_tiles(kSchedule[5], csla);
  const KeyLists lists = csla_lists(kSchedule, 5, csla, tiles), moved = places.lists(lists);
  require_sound(places.tiles(5, tiles), moved);
  for (int t = 0; t < tiles.count(); ++t) EXPECT_EQ(keys_of(moved, 0, t), places_of(keys_of(lists, 0, t)));
  EXPECT_NE(moved.runs, lists.runs);
  EXPECT_EQ(places.back(moved).runs, lists.runs);
  EXPECT_EQ(places.back(moved).offset, lists.offset);
}

/// The recipe of lists that lie in another order, followed with a choice in that order, gives the same keys.
TEST(KeyPlaces, RecipesFollowAChoiceByPlace) {
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  const KeyPlaces places(kSchedule, kOrder);
  for (const auto carry : {Cs4aAttention::Carry::group, Cs4aAttention::Carry::ratio, Cs4aAttention::Carry::grid}) {
    Cs4aAttention method;
    method.decision_scale = 4;
    method.group = {3, 4, 0};
    method.carry = carry;
    method.own_windows = {3};
    constexpr int kChosen = 9;
    const int groups = group_tiles(kSchedule[4], method.group).count(), keys = first_keys(kSchedule, 4).back();
    const ListRecipe recipe =
        carry_recipe(method, kSchedule, 5, group_tiles(kSchedule[5], method.group), groups, kChosen);
    const ListRecipe moved = places.recipe(5, recipe);
    std::vector<std::int32_t> choice, by_place, all(static_cast<std::size_t>(keys));
    std::iota(all.begin(), all.end(), 0);
    for (int g = 0; g < groups; ++g) {
      std::shuffle(all.begin(), all.end(), random);
      choice.insert(choice.end(), all.begin(), all.begin() + kChosen);
    }
    by_place.reserve(choice.size());
    for (const std::int32_t key : choice) by_place.push_back(place_of_key(key));
    const KeyLists wanted = follow(recipe, choice.data(), 1, groups, kChosen),
                   found = follow(moved, by_place.data(), 1, groups, kChosen);
    for (int t = 0; t < recipe.tiles.count(); ++t)
      EXPECT_EQ(keys_of(found, 0, t), places_of(keys_of(wanted, 0, t))) << "seed " << seed << ", tile " << t;
  }
}

TEST(KeyPlaces, NothingMovesWhereTilesAreAsWideAsTheMaps) {
  const KeyPlaces places(kSchedule, {4, 16});
  EXPECT_TRUE(places.none());
  EXPECT_EQ(places.queries(5, {17, 3}), (std::vector<std::int32_t>{17, 3}));
}

}  // namespace
}  // namespace sparvar
