#include "attention/key_lists.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {

std::int64_t KeyLists::keys_in(int list, int tile) const {
  std::int64_t count = 0;
  const std::int64_t at = static_cast<std::int64_t>(list) * tiles + tile;
  for (std::int64_t r = offset[at]; r < offset[at + 1]; ++r) count += runs[r].count;
  return count;
}

namespace {

template <typename T>
bool ascends(const std::vector<T>& offset, std::size_t entries) {
  return !offset.empty() && offset.front() == 0 && static_cast<std::size_t>(offset.back()) == entries &&
         std::is_sorted(offset.begin(), offset.end());
}

}  // namespace

void require_sound(const QueryTiles& tiles, const KeyLists& lists) {
  const auto refuse = [](const std::string& why) { throw Error(ErrorKind::usage, "lists of keys: " + why); };
  if (!ascends(tiles.offset, tiles.rows.size())) refuse("the offsets of the tiles do not ascend to their last row");
  for (const std::int32_t row : tiles.rows)
    if (row < 0) refuse(fmt::format("row {} of a tile", row));
  if (lists.lists < 1 || lists.tiles != tiles.count() ||
      lists.offset.size() != static_cast<std::size_t>(lists.lists) * static_cast<std::size_t>(lists.tiles) + 1)
    refuse(fmt::format("{} x {} lists with {} offsets do not fit {} tiles", lists.lists, lists.tiles,
                       lists.offset.size(), tiles.count()));
  if (!ascends(lists.offset, lists.runs.size())) refuse("the offsets of the lists do not ascend to their last run");
  for (std::size_t at = 0; at + 1 < lists.offset.size(); ++at) {
    std::int64_t end = 0;
    for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r) {
      const KeyRun& run = lists.runs[r];
      if (run.begin < end || run.count < 0)
        refuse(
            fmt::format("list {} has the run of {} keys from {} on after key {}: runs are sorted and hold no key twice",
                        at, run.count, run.begin, end - 1));
      end = std::int64_t{run.begin} + run.count;
    }
  }
}

QueryTiles row_tiles(int queries, int per_tile) {
  QueryTiles tiles;
  for (int q = 0; q < queries; ++q) tiles.rows.push_back(q);
  for (int first = 0; first < queries; first += per_tile) tiles.offset.push_back(std::min(first + per_tile, queries));
  return tiles;
}

QueryTiles grid_tiles(Grid grid, int tile_h, int tile_w) {
  QueryTiles tiles;
  for (int top = 0; top < grid.h; top += tile_h)
    for (int left = 0; left < grid.w; left += tile_w) {
      for (int y = top; y < std::min(top + tile_h, grid.h); ++y)
        for (int x = left; x < std::min(left + tile_w, grid.w); ++x) tiles.rows.push_back(y * grid.w + x);
      tiles.offset.push_back(static_cast<std::int32_t>(tiles.rows.size()));
    }
  return tiles;
}

QueryTiles group_tiles(Grid grid, const QueryGroup& group) {
  return group.rows > 0 ? row_tiles(grid.tokens(), group.rows) : grid_tiles(grid, group.tile_h, group.tile_w);
}

KeyLists all_keys(const QueryTiles& tiles, int keys) {
  KeyLists lists;
  lists.tiles = tiles.count();
  for (int t = 0; t < tiles.count(); ++t) {
    lists.runs.push_back({0, keys});
    lists.offset.push_back(t + 1);
  }
  return lists;
}

double share_of_pairs(const QueryTiles& tiles, const KeyLists& lists, int keys) {
  double pairs = 0;
  for (int list = 0; list < lists.lists; ++list)
    for (int t = 0; t < tiles.count(); ++t) pairs += static_cast<double>(lists.keys_in(list, t)) * tiles.rows_in(t);
  const double all = static_cast<double>(lists.lists) * static_cast<double>(tiles.rows.size()) * keys;
  return all > 0 ? pairs / all : 0;
}

KeySet::KeySet(int keys) : keys_(keys), words_(static_cast<std::size_t>(keys + 63) / 64, 0) {}

void KeySet::add(int begin, int count) {
  const int end = std::min(begin + count, keys_);
  begin = std::max(begin, 0);
  if (begin >= end) return;
  const int first = begin / 64;
  const int last = (end - 1) / 64;
  const std::uint64_t head = ~0ULL << (begin % 64);
  const std::uint64_t tail = ~0ULL >> (63 - (end - 1) % 64);
  if (first == last) {
    words_[first] |= head & tail;
    return;
  }
  words_[first] |= head;
  std::fill(words_.begin() + first + 1, words_.begin() + last, ~0ULL);
  words_[last] |= tail;
}

void KeySet::flush(KeyLists& lists) {
  const std::size_t start = lists.runs.size();
  for (std::size_t w = 0; w < words_.size(); ++w) {
    std::uint64_t word = words_[w];
    int at = 0;
    while (word != 0) {
      const int zeros = std::countr_zero(word);
      word >>= zeros;
      at += zeros;
      const int ones = std::countr_one(word);
      const int key = static_cast<int>(w) * 64 + at;
      if (lists.runs.size() > start && lists.runs.back().begin + lists.runs.back().count == key)
        lists.runs.back().count += ones;  // goes on from the word before
      else
        lists.runs.push_back({key, ones});
      word = ones == 64 ? 0 : word >> ones;
      at += ones;
    }
    words_[w] = 0;
  }
  lists.offset.push_back(static_cast<std::int64_t>(lists.runs.size()));
}

KeyLists build_lists(int lists, int tiles, int keys, const std::function<void(int, int, KeySet&)>& fill) {
  // Pieces of consecutive (list, tile) pairs, each built by one thread, then joined in order.
  const std::int64_t all = static_cast<std::int64_t>(lists) * tiles;
  constexpr std::int64_t kPiece = 16;
  std::vector<KeyLists> pieces(static_cast<std::size_t>((all + kPiece - 1) / kPiece));
  parallel_for(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t piece) {
    KeySet set(keys);
    for (std::int64_t i = piece * kPiece; i < std::min(all, (piece + 1) * kPiece); ++i) {
      fill(static_cast<int>(i / tiles), static_cast<int>(i % tiles), set);
      set.flush(pieces[piece]);
    }
  });
  KeyLists out;
  out.lists = lists;
  out.tiles = tiles;
  for (const KeyLists& piece : pieces) {
    const auto before = static_cast<std::int64_t>(out.runs.size());
    out.runs.insert(out.runs.end(), piece.runs.begin(), piece.runs.end());
    for (std::size_t i = 1; i < piece.offset.size(); ++i) out.offset.push_back(before + piece.offset[i]);
  }
  return out;
}

int ListRecipe::most_keys() const {
  std::int64_t most = 0;
  for (int t = 0; t < fixed.tiles; ++t) most = std::max(most, fixed.keys_in(0, t));
  return static_cast<int>(std::min<std::int64_t>(keys, most + chosen));
}

KeyLists follow(const ListRecipe& recipe, const std::int32_t* choice, int lists, int groups, int per_group) {
  return build_lists(lists, recipe.tiles.count(), recipe.keys, [&](int list, int tile, KeySet& set) {
    const std::int32_t* of_group =
        choice + (static_cast<std::int64_t>(list) * groups + recipe.group_of[tile]) * per_group;
    for (int i = 0; i < recipe.chosen; ++i) set.add(recipe.map.empty() ? of_group[i] : recipe.map[of_group[i]], 1);
    if (recipe.fixed.tiles == 0) return;
    for (std::int64_t r = recipe.fixed.offset[tile]; r < recipe.fixed.offset[tile + 1]; ++r)
      set.add(recipe.fixed.runs[r].begin, recipe.fixed.runs[r].count);
  });
}

KeyLists follow(const ListRecipe& recipe, const Tensor& choice) {
  return follow(recipe, choice.data<std::int32_t>(), static_cast<int>(choice.dim(0)), static_cast<int>(choice.dim(1)),
                static_cast<int>(choice.dim(2)));
}

}  // namespace sparvar
