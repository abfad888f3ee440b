#include "attention/token_order.h"

namespace sparvar {
namespace {

std::vector<std::int32_t> inverse(const std::vector<std::int32_t>& of) {
  std::vector<std::int32_t> out(of.size());
  for (std::size_t i = 0; i < of.size(); ++i) out[of[i]] = static_cast<std::int32_t>(i);
  return out;
}

/// The same lists with key `i` named to[i].
KeyLists renamed(const KeyLists& lists, const std::vector<std::int32_t>& to) {
  return build_lists(lists.lists, lists.tiles, static_cast<int>(to.size()), [&](int list, int tile, KeySet& set) {
    const std::int64_t at = std::int64_t{list} * lists.tiles + tile;
    for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
      for (int i = 0; i < lists.runs[r].count; ++i) set.add(to[lists.runs[r].begin + i], 1);
  });
}

}  // namespace

std::vector<std::int32_t> places_of_tokens(const TokenMap& map) {
  std::vector<std::int32_t> out;
  if (map.by_rows()) return out;
  for (int row = 0; row < map.grid.h; ++row)
    for (int column = 0; column < map.grid.w; ++column) out.push_back(map.place(row, column));
  return out;
}

std::vector<std::int32_t> tokens_by_place(const TokenMap& map) { return inverse(places_of_tokens(map)); }

KeyPlaces::KeyPlaces(const ScaleSchedule& schedule, TokenOrder order) : schedule_(schedule), order_(order) {
  const auto moves = [&](Grid grid) { return !TokenMap(grid, order).by_rows(); };
  if (std::none_of(schedule.begin(), schedule.end(), moves)) return;
  for (const Grid& grid : schedule) {
    const auto first = static_cast<std::int32_t>(place_.size());
    const TokenMap map(grid, order);
    for (int row = 0; row < grid.h; ++row)
      for (int column = 0; column < grid.w; ++column) place_.push_back(first + map.place(row, column));
  }
  key_ = inverse(place_);
}

std::vector<std::int32_t> KeyPlaces::queries(int scale, std::vector<std::int32_t> tokens) const {
  const TokenMap of = map(scale);
  for (std::int32_t& token : tokens) token = of.place(token / of.grid.w, token % of.grid.w);
  return tokens;
}

QueryTiles KeyPlaces::tiles(int scale, QueryTiles tiles) const {
  tiles.rows = queries(scale, std::move(tiles.rows));
  return tiles;
}

KeyLists KeyPlaces::lists(const KeyLists& lists) const { return none() ? lists : renamed(lists, place_); }
KeyLists KeyPlaces::back(const KeyLists& lists) const { return none() ? lists : renamed(lists, key_); }

ListRecipe KeyPlaces::recipe(int scale, ListRecipe recipe) const {
  if (none()) return recipe;
  recipe.tiles = tiles(scale, std::move(recipe.tiles));
  recipe.fixed = lists(recipe.fixed);
  // A key that stays the same token keeps its place; another one is looked up by the place of the chosen.
  std::vector<std::int32_t> moved(recipe.map.size());
  for (std::size_t key = 0; key < moved.size(); ++key) moved[place_[key]] = place_[recipe.map[key]];
  recipe.map = std::move(moved);
  return recipe;
}

}  // namespace sparvar
