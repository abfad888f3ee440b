// In which order the tokens of a map lie inside the transformer. Attention does not mind the order of keys, nor that of
// queries as long as outputs are put back: positions follow the tokens, and lists of keys are moved to their places.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/key_lists.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// Row by row (0 x 0), or tile by tile from the upper left, each row by row; tiles at the right and bottom border are
/// smaller where the map is no multiple of them.
struct TokenOrder {
  int tile_h = 0;
  int tile_w = 0;
  bool operator==(const TokenOrder&) const = default;
};

/// A map and where its tokens lie.
struct TokenMap {
  Grid grid;
  TokenOrder order;

  constexpr TokenMap(Grid of, TokenOrder lie = {}) : grid(of), order(lie) {}  // a grid alone: row by row
  /// No tile is narrower than the map.
  constexpr bool by_rows() const { return order.tile_h == 0 || order.tile_w == 0 || order.tile_w >= grid.w; }
  constexpr int place(int row, int column) const {
    if (by_rows()) return row * grid.w + column;
    const int top = row / order.tile_h * order.tile_h, left = column / order.tile_w * order.tile_w;
    const int height = order.tile_h < grid.h - top ? order.tile_h : grid.h - top;
    const int width = order.tile_w < grid.w - left ? order.tile_w : grid.w - left;
    return top * grid.w + left * height + (row - top) * width + column - left;
  }
};

/// The token (row * w + column) at each place; empty where they lie row by row.
std::vector<std::int32_t> tokens_by_place(const TokenMap& map);
/// The place of each token; empty where they lie row by row.
std::vector<std::int32_t> places_of_tokens(const TokenMap& map);

/// Moves tiles and lists that are made row by row to where tokens and keys lie; the keys of a scale stay together.
class KeyPlaces {
 public:
  KeyPlaces(const ScaleSchedule& schedule, TokenOrder order);
  /// Nothing moves.
  bool none() const { return place_.empty(); }
  TokenMap map(int scale) const { return {schedule_[scale], order_}; }

  std::vector<std::int32_t> queries(int scale, std::vector<std::int32_t> tokens) const;
  QueryTiles tiles(int scale, QueryTiles tiles) const;
  KeyLists lists(const KeyLists& lists) const;
  /// A recipe whose choice is made among keys that lie in this order.
  ListRecipe recipe(int scale, ListRecipe recipe) const;
  /// Lists of keys by place, row by row again.
  KeyLists back(const KeyLists& lists) const;

 private:
  ScaleSchedule schedule_;
  TokenOrder order_;
  std::vector<std::int32_t> place_, key_;  // of each key of the schedule, and its inverse; empty where nothing moves
};

}  // namespace sparvar
