// Attention to lists of keys: lists that are known beforehand, and lists that are made on the device from a choice.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

/// Queries of a QueryTiles on the device, in pieces that a kernel takes: of at most TileRows::kMost, and, for the
/// Hopper kernel, of at most TileRows::kMostHopper.
struct DeviceTiles {
  Tensor rows;
  Pieces narrow, wide;
  int queries = 0;  // one more than the largest
};

class CudaLists final : public AttentionLists {
 public:
  DeviceTiles tiles;
  Tensor ranges, keys;
  int lists = 1, list_tiles = 0;
  int most_key = 0;  // one more than the largest
  int box_keys = 0;  // ListAttention::box_keys
};

class CudaRecipe final : public AttentionRecipe {
 public:
  DeviceTiles tiles;
  Tensor group_of, map, fixed, queries;
  int list_tiles = 0, keys = 0, chosen = 0;
  int groups = 0;  // at least so many must have chosen
  std::int64_t capacity = 0;
};

using Kept = std::function<Tensor(const void*, DType, std::int64_t)>;

Tensor kept_tiles(const std::vector<TileRows>& tiles, const Kept& kept) {
  return kept(tiles.data(), DType::u8, static_cast<std::int64_t>(tiles.size() * sizeof(TileRows)));
}

/// Tiles of more than `most` queries in as few equal pieces as possible, the largest ones first.
Pieces pieces_of(const QueryTiles& tiles, int most, const Kept& kept) {
  std::vector<TileRows> out;
  int largest = 0;
  for (int t = 0; t < tiles.count(); ++t) {
    const int parts = (tiles.rows_in(t) + most - 1) / most;
    for (int p = 0; p < parts; ++p) {
      const int begin = tiles.offset[t] + tiles.rows_in(t) * p / parts;
      const int end = tiles.offset[t] + tiles.rows_in(t) * (p + 1) / parts;
      largest = std::max(largest, end - begin);
      out.push_back({.first_query = begin, .queries = end - begin, .list = t, .shift = 0});
    }
  }
  const auto others =
      std::stable_partition(out.begin(), out.end(), [&](const TileRows& x) { return x.queries == largest; });
  return {.tiles = kept_tiles(out, kept),
          .count = static_cast<int>(out.size()),
          .whole = static_cast<int>(others - out.begin()),
          .most_queries = largest};
}

template <typename T>
const T* address(const Tensor& x) {
  return x.defined() && x.size() > 0 ? reinterpret_cast<const T*>(x.raw()) : nullptr;
}

std::int64_t aligned_keys(std::int64_t keys) {
  return (keys + KeyRange::kAlignment - 1) / KeyRange::kAlignment * KeyRange::kAlignment;
}

std::int64_t whole_stages(std::int64_t keys) {
  return (keys + LogitRows::kStage - 1) / LogitRows::kStage * LogitRows::kStage;
}

DeviceTiles put_tiles(const QueryTiles& tiles, const Kept& kept) {
  DeviceTiles out;
  for (const std::int32_t row : tiles.rows) out.queries = std::max(out.queries, row + 1);
  out.rows = kept(tiles.rows.data(), DType::i32, static_cast<std::int64_t>(tiles.rows.size()));
  out.narrow = pieces_of(tiles, TileRows::kMost, kept);
  bool wider = false;
  for (int t = 0; t < tiles.count(); ++t) wider = wider || tiles.rows_in(t) > TileRows::kMost;
  out.wide = wider ? pieces_of(tiles, TileRows::kMostHopper, kept) : out.narrow;
  return out;
}

/// Does attention_hopper.cu take it?
bool on_hopper(const AttentionArgs& args, bool hopper) {
  return hopper && args.q.dtype() == DType::bf16 && hopper_takes_heads_of(static_cast<int>(args.q.dim(3)));
}

/// ListAttention::box_keys of these lists, whose largest key is keys_end - 1.
int box_keys_of(const KeyLists& lists, int keys_end) {
  if (keys_end <= 0) return 0;
  const auto fits = [&](int box) {
    for (std::size_t at = 0; at + 1 < lists.offset.size(); ++at)
      for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
        if (lists.runs[r].count % box != 0 && lists.runs[r].begin + lists.runs[r].count != keys_end) return false;
    return true;
  };
  return fits(128) ? 128 : fits(64) ? 64 : 0;
}

ListAttention call_of(const AttentionArgs& args, const Pieces& pieces, const Tensor& rows, bool hopper) {
  return {.q = args.q.raw(),
          .k = args.k.raw(),
          .v = args.v.raw(),
          .out = const_cast<void*>(args.out.raw()),
          .type = args.q.dtype(),
          .batch = static_cast<int>(args.q.dim(0)),
          .heads = static_cast<int>(args.q.dim(1)),
          .dim = static_cast<int>(args.q.dim(3)),
          .queries = static_cast<int>(args.q.dim(2)),
          .out_queries = static_cast<int>(args.out.dim(1)),
          .capacity = args.k.dim(2),
          .tiles = address<TileRows>(pieces.tiles),
          .ranges = nullptr,
          .rows = address<std::int32_t>(rows),
          .keys = nullptr,
          .tile_count = pieces.count,
          .list_tiles = 0,
          .whole_tiles = pieces.whole,
          .most_queries = pieces.most_queries,
          .own_lists = false,
          .scale = args.scale,
          .statistics = args.statistics.defined() ? const_cast<float*>(args.statistics.data<float>()) : nullptr,
          .hopper = hopper};
}

ListAttention call_of(const AttentionArgs& args, const DeviceTiles& tiles, bool hopper) {
  return call_of(args, on_hopper(args, hopper) ? tiles.wide : tiles.narrow, tiles.rows, hopper);
}

/// Groups of queries cut into stages of 64: large groups for themselves, small ones together.
struct ColumnTable {
  std::vector<std::int32_t> rows, group_of, stages;  // stages: ColumnStage, four numbers each
  bool empty_group = false;
};

ColumnTable column_table(const QueryTiles& groups) {
  constexpr int kQueries = ColumnStage::kQueries;
  ColumnTable out;
  int used = kQueries;  // of the stage that small groups share
  bool sharing = false;
  const auto begin_stage = [&](ColumnStage::Kind kind, int group) {
    out.stages.insert(out.stages.end(), {kind, group, 0, 0});
    out.rows.resize(out.rows.size() + kQueries, -1);
    out.group_of.resize(out.rows.size(), -1);
    used = 0;
  };
  const auto put = [&](int group, int from) {
    const std::size_t at = out.rows.size() - kQueries + used++;
    out.rows[at] = groups.rows[from];
    out.group_of[at] = group;
    out.stages[out.stages.size() - 2] = used;
  };
  for (int g = 0; g < groups.count(); ++g) {
    const int count = groups.rows_in(g);
    out.empty_group = out.empty_group || count == 0;
    if (count == 0) continue;
    if (count <= kQueries / 2) {
      if (!sharing || used + count > kQueries) begin_stage(ColumnStage::single, g);
      sharing = true;
      if (count > 1) out.stages[out.stages.size() - 4] = ColumnStage::several;
      for (int i = 0; i < count; ++i) put(g, groups.offset[g] + i);
      continue;
    }
    sharing = false;
    for (int i = 0; i < count; ++i) {
      if (i % kQueries == 0) begin_stage(i + kQueries < count ? ColumnStage::part : ColumnStage::last_part, g);
      put(g, groups.offset[g] + i);
    }
  }
  if (out.rows.size() / kQueries % 2 != 0) begin_stage(ColumnStage::part, 0);  // kernels take them in pairs
  return out;
}

void refuse_plan(const std::string& why) { throw Error(ErrorKind::usage, "attention plan on a GPU: " + why); }

}  // namespace

/// Kept beside the weights: a program that is recorded reads it whenever it runs. Copied in a dry run too, as what is
/// made then is used later. In the order of the stream, since kernels of lists that are gone may still read this
/// memory; not while a program is recorded, of which it would become a part.
Tensor CudaBackend::kept(const void* values, DType type, std::int64_t count) {
  Tensor out = weight_memory(type, {count});
  if (planning_ || count == 0) return out;
  if (!recording_) {
    check(cudaMemcpyAsync(out.raw(), values, out.bytes(), cudaMemcpyHostToDevice, stream_), "lists of keys");
    return out;
  }
  const Relaxed relaxed;
  check(cudaMemcpy(out.raw(), values, out.bytes(), cudaMemcpyHostToDevice), "lists of keys");
  return out;
}

Tensor CudaBackend::kept_rows(const std::vector<std::int32_t>& rows) {
  const auto found = kept_rows_.find(rows);
  if (found != kept_rows_.end()) return found->second;
  return kept_rows_.emplace(rows, kept(rows.data(), DType::i32, static_cast<std::int64_t>(rows.size()))).first->second;
}

AttentionListsPtr CudaBackend::prepare_lists(const QueryTiles& tiles, const KeyLists& lists) {
  require_sound(tiles, lists);
  std::vector<KeyRange> ranges;
  std::vector<std::int32_t> keys;
  auto out = std::make_shared<CudaLists>();
  for (std::int64_t at = 0; at < std::int64_t{lists.lists} * lists.tiles; ++at) {
    const auto first = static_cast<std::int64_t>(keys.size());
    for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r) {
      const KeyRun& run = lists.runs[r];
      for (int i = 0; i < run.count; ++i) keys.push_back(run.begin + i);
      out->most_key = std::max(out->most_key, run.begin + run.count);
    }
    ranges.push_back(
        {.first = first, .keys = static_cast<int>(static_cast<std::int64_t>(keys.size()) - first), .unused = 0});
    keys.resize(static_cast<std::size_t>(aligned_keys(static_cast<std::int64_t>(keys.size()))));
  }
  out->box_keys = box_keys_of(lists, out->most_key);
  out->lists = lists.lists;
  out->list_tiles = lists.tiles;
  out->tiles = put_tiles(tiles, [this](auto... x) { return kept(x...); });
  out->ranges = kept(ranges.data(), DType::u8, static_cast<std::int64_t>(ranges.size() * sizeof(KeyRange)));
  out->keys = kept(keys.data(), DType::i32, static_cast<std::int64_t>(keys.size()));
  return out;
}

void CudaBackend::attention(AttentionArgs& args, const AttentionLists& lists) {
  const auto& own = dynamic_cast<const CudaLists&>(lists);
  check_args(args, own.most_key);
  if (own.tiles.queries > args.q.dim(2) || (own.lists != 1 && own.lists != args.q.dim(0) * args.q.dim(1)))
    throw Error(ErrorKind::usage, fmt::format("{} lists for {} queries do not fit q {}", own.lists, own.tiles.queries,
                                              to_string(args.q.shape())));
  if (args.q.dtype() == DType::bf16 && !fits_tensor_cores(args.q.dim(3)))
    return attend_in_f32(args, converted(args.out, DType::f32), [&](AttentionArgs& wide) { attention(wide, lists); });
  if (!computes()) return;
  ListAttention call = call_of(args, own.tiles, hopper_);
  call.ranges = address<KeyRange>(own.ranges);
  call.keys = address<std::int32_t>(own.keys);
  call.list_tiles = own.list_tiles;
  call.own_lists = own.lists > 1;
  call.box_keys = older_.boxes ? 0 : own.box_keys;
  call.keys_end = own.most_key;
  call.settled = recording_;
  list_attention(call, stream_);
}

/// Lists for this call alone: not in a program, which would read them when they are gone.
void CudaBackend::attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) {
  if (recording_ || dry_) refuse_plan("lists of one call cannot be recorded; prepare them");
  const AttentionListsPtr prepared = prepare_lists(tiles, lists);
  attention(args, *prepared);
  check(cudaStreamSynchronize(stream_), "attention of lists");
}

AttentionRecipePtr CudaBackend::prepare_recipe(const ListRecipe& recipe) {
  auto out = std::make_shared<CudaRecipe>();
  const auto keep = [this](auto... x) { return kept(x...); };
  const auto keep_numbers = [&](const std::vector<std::int32_t>& x) {
    return keep(x.data(), DType::i32, static_cast<std::int64_t>(x.size()));
  };
  const int tiles = recipe.tiles.count();
  out->tiles = put_tiles(recipe.tiles, keep);
  out->list_tiles = tiles;
  out->keys = recipe.keys;
  out->chosen = recipe.chosen;
  for (const std::int32_t group : recipe.group_of) out->groups = std::max(out->groups, group + 1);
  out->capacity = aligned_keys(recipe.most_keys());
  out->group_of = keep_numbers(recipe.group_of);
  if (!recipe.map.empty()) out->map = keep_numbers(recipe.map);
  std::vector<std::int32_t> queries;
  queries.reserve(tiles);
  for (int t = 0; t < tiles; ++t) queries.push_back(recipe.tiles.rows_in(t));
  out->queries = keep_numbers(queries);
  if (recipe.fixed.tiles == 0) return out;
  const std::int64_t words = (recipe.keys + 31) / 32;
  std::vector<std::uint32_t> fixed(static_cast<std::size_t>(tiles * words));
  for (int t = 0; t < tiles; ++t)
    for (std::int64_t r = recipe.fixed.offset[t]; r < recipe.fixed.offset[t + 1]; ++r)
      for (int i = 0; i < recipe.fixed.runs[r].count; ++i) {
        const int key = recipe.fixed.runs[r].begin + i;
        fixed[t * words + key / 32] |= 1U << key % 32;
      }
  out->fixed = keep(fixed.data(), DType::i32, static_cast<std::int64_t>(fixed.size()));
  return out;
}

namespace {

void check_resize(const Tensor& out, const Tensor& cache, Grid from, Grid to) {
  if (out.dim(1) != to.tokens() || cache.dim(1) != from.tokens() || cache.dim(0) != out.dim(0))
    throw Error(ErrorKind::usage,
                fmt::format("cache {} of a {}x{} map does not fit {} of a {}x{} map", to_string(cache.shape()), from.h,
                            from.w, to_string(out.shape()), to.h, to.w));
}

}  // namespace

void CudaBackend::attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) {
  follow_recipe(args, recipe, choice, pairs, {});
}

void CudaBackend::attention_with_residual(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice,
                                          Tensor& pairs, const Tensor& cache, const TokenMap& from,
                                          const TokenMap& to) {
  check_resize(args.out, cache, from.grid, to.grid);
  // The kernel adds to what it writes: to all tokens, then, which lie row by row.
  const DeviceTiles& tiles = dynamic_cast<const CudaRecipe&>(recipe).tiles;
  const bool all = tiles.queries == to.grid.tokens() && tiles.rows.size() == to.grid.tokens();
  if (older_.epilogue || !all || !from.by_rows() || !to.by_rows() || !on_hopper(args, hopper_) ||
      cache.dtype() != DType::bf16 || cache.size() / cache.dim(0) >= (1LL << 31))
    return Backend::attention_with_residual(args, recipe, choice, pairs, cache, from, to);
  follow_recipe(args, recipe, choice, pairs, {.cache = cache.raw(), .from = from.grid, .to = to.grid});
}

void CudaBackend::follow_recipe(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs,
                                const ResizedResidual& residual) {
  const auto& own = dynamic_cast<const CudaRecipe&>(recipe);
  check_args(args, own.keys);
  const std::int64_t lists = args.q.dim(0) * args.q.dim(1);
  if (choice.rank() != 3 || choice.dim(0) < lists || choice.dim(1) < own.groups || choice.dim(2) < own.chosen ||
      own.tiles.queries > args.q.dim(2))
    throw Error(ErrorKind::usage,
                fmt::format("a choice of keys {} does not fit lists of {} keys of {} queries, q {}",
                            to_string(choice.shape()), own.chosen, own.tiles.queries, to_string(args.q.shape())));
  if (args.q.dtype() == DType::bf16 && !fits_tensor_cores(args.q.dim(3)))
    return attend_in_f32(args, converted(args.out, DType::f32),
                         [&](AttentionArgs& wide) { follow_recipe(wide, recipe, choice, pairs, {}); });
  Tensor ranges = empty(DType::u8, {lists * own.list_tiles * static_cast<std::int64_t>(sizeof(KeyRange))});
  Tensor keys = empty(DType::i32, {lists, own.list_tiles, own.capacity});
  if (!computes()) return;
  cuda::build_lists({.choice = choice.data<std::int32_t>(),
                     .lists = static_cast<int>(lists),
                     .groups = static_cast<int>(choice.dim(1)),
                     .per_group = static_cast<int>(choice.dim(2)),
                     .chosen = own.chosen,
                     .tiles = own.list_tiles,
                     .keys = own.keys,
                     .group_of = address<std::int32_t>(own.group_of),
                     .map = address<std::int32_t>(own.map),
                     .fixed = address<std::uint32_t>(own.fixed),
                     .queries = address<std::int32_t>(own.queries),
                     .capacity = own.capacity,
                     .ranges = reinterpret_cast<KeyRange*>(ranges.raw()),
                     .list_keys = keys.data<std::int32_t>(),
                     .pairs = pairs.defined() ? reinterpret_cast<unsigned long long*>(pairs.raw()) : nullptr,
                     .staged = !older_.lists},
                    stream_);
  ListAttention call = call_of(args, own.tiles, hopper_);
  call.ranges = reinterpret_cast<const KeyRange*>(ranges.raw());
  call.keys = keys.data<std::int32_t>();
  call.list_tiles = own.list_tiles;
  call.own_lists = true;
  call.residual = residual;
  list_attention(call, stream_);
}

/// Tiles of `per_tile` queries and all keys, in `parts` parts: part p writes behind the outputs of the parts before.
const CudaBackend::Parts& CudaBackend::parts_of(int queries, int keys, int parts, int per_tile) {
  Parts& known = parts_[{queries, keys, parts, per_tile}];
  if (known.rows.defined()) return known;
  const QueryTiles tiles = row_tiles(queries, per_tile);
  std::vector<TileRows> pieces;
  std::vector<KeyRange> ranges;
  std::vector<std::int32_t> all(static_cast<std::size_t>(aligned_keys(keys)));
  for (int i = 0; i < keys; ++i) all[i] = i;
  for (int p = 0; p < parts; ++p) {
    const std::int64_t begin = p == 0 ? 0 : ranges.back().first + ranges.back().keys;
    const std::int64_t end = p + 1 == parts ? keys : whole_stages(std::int64_t{keys} * (p + 1) / parts);
    ranges.push_back({.first = begin, .keys = static_cast<int>(end - begin), .unused = 0});
    for (int t = 0; t < tiles.count(); ++t)
      pieces.push_back({.first_query = tiles.offset[t], .queries = tiles.rows_in(t), .list = p, .shift = p * queries});
  }
  known.pieces = {.tiles = kept_tiles(pieces, [this](auto... x) { return kept(x...); }),
                  .count = static_cast<int>(pieces.size()),
                  .whole = parts == 1 ? queries / per_tile : 0,
                  .most_queries = std::min(queries, per_tile)};
  known.ranges = kept(ranges.data(), DType::u8, static_cast<std::int64_t>(ranges.size() * sizeof(KeyRange)));
  known.keys = kept(all.data(), DType::i32, static_cast<std::int64_t>(all.size()));
  known.rows = kept(tiles.rows.data(), DType::i32, queries);
  return known;
}

/// `rows`: of the queries, where it is defined, or else all; there are `queries` of them.
void CudaBackend::attend_parts(const AttentionArgs& args, int queries, int keys, int parts, int per_tile,
                               const LogitRows& logits, const Tensor& rows) {
  const Parts& known = parts_of(queries, keys, parts, per_tile);
  if (!computes()) return;
  ListAttention call = call_of(args, known.pieces, rows.defined() ? rows : known.rows, hopper_);
  call.ranges = address<KeyRange>(known.ranges);
  call.in_order = rows.defined();
  call.keys = address<std::int32_t>(known.keys);
  call.list_tiles = parts;
  call.logits = logits;
  call.box_keys = older_.boxes ? 0 : parts == 1 ? 128 : LogitRows::kStage;
  call.keys_end = keys;
  call.settled = recording_;
  list_attention(call, stream_);
}

/// Dense attention of few queries, whose keys are shared out in parts that different multiprocessors take.
void CudaBackend::attend_in_parts(AttentionArgs& args, int keys, const LogitRows& logits, const Tensor& rows) {
  constexpr int kPartsWanted = 264;  // two for each multiprocessor of an H100
  constexpr int kLeastKeys = 512;
  const std::int64_t heads = args.q.dim(0) * args.q.dim(1);
  const auto queries = static_cast<int>(args.statistics.dim(2));
  const std::int64_t tiles = (queries + 63) / 64;
  const int parts = static_cast<int>(std::clamp<std::int64_t>(kPartsWanted / (heads * tiles), 1, keys / kLeastKeys));
  AttentionArgs split = args;
  split.out = empty(args.out.dtype(), {args.q.dim(0), std::int64_t{parts} * queries, args.q.dim(1), args.q.dim(3)});
  split.statistics = empty(DType::f32, {args.q.dim(0), args.q.dim(1), std::int64_t{parts} * queries, 2});
  attend_parts(split, queries, keys, parts, 64, logits, rows);
  if (computes())
    merge_parts(split.out.raw(), split.statistics.data<float>(), args.out.dtype(), static_cast<int>(args.q.dim(0)),
                static_cast<int>(args.q.dim(1)), static_cast<int>(args.q.dim(3)), queries, parts, args.out.raw(),
                args.statistics.data<float>(), stream_);
}

namespace {

/// What attend_parts takes with tiles of so many queries: microseconds besides the keys, and nanoseconds for each key
/// of a tile in each round of all multiprocessors. Fitted to an H200 with heads of 128, 144 x 265 to 4096 x 10521
/// (gpu_kernels attention); what counts is how they compare.
struct TileCost {
  int queries, blocks;  // of a multiprocessor
  double fixed_us, key_ns;
};
constexpr TileCost kTileCosts[] = {{64, 2, 4.5, 15.3}, {128, 1, 5.5, 13.7}, {192, 1, 5, 19.4}};

double microseconds(const TileCost& tile, const AttentionArgs& args, int keys, int multiprocessors) {
  constexpr double kRagged = 0.6;  // of a round, where only tiles with fewer queries are left
  const std::int64_t heads = args.q.dim(0) * args.q.dim(1), queries = args.q.dim(2);
  const std::int64_t slots = std::int64_t{tile.blocks} * multiprocessors;
  const auto rounds = [&](std::int64_t tiles) { return (heads * tiles + slots - 1) / slots; };
  const std::int64_t whole = std::max<std::int64_t>(rounds(queries / tile.queries), 1);
  const std::int64_t all = rounds((queries + tile.queries - 1) / tile.queries);
  const double key_ns =
      tile.key_ns * static_cast<double>(args.q.dim(3) + 80) / 208;  // exponentials do not depend on it
  return tile.fixed_us +
         key_ns * 1e-3 * keys * (static_cast<double>(whole) + kRagged * static_cast<double>(all - whole));
}

}  // namespace

int CudaBackend::tile_for_all_keys(const AttentionArgs& args, int keys) const {
  if (older_.dense || !on_hopper(args, hopper_)) return 0;
  return std::ranges::min_element(
             kTileCosts, {}, [&](const TileCost& tile) { return microseconds(tile, args, keys, gpu_.multiprocessors); })
      ->queries;
}

Tensor CudaBackend::column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) {
  check_args(args, keys);
  if (args.q.dtype() == DType::bf16 && !fits_tensor_cores(args.q.dim(3))) {
    AttentionArgs wide = args;
    wide.q = converted(args.q, DType::f32);
    wide.k = converted(args.k, DType::f32);
    wide.v = wide.k;  // not read
    return column_sums(wide, groups, keys);
  }
  const ColumnTable table = column_table(groups);
  const Tensor rows = kept_rows(table.rows), group_of = kept_rows(table.group_of), stages = kept_rows(table.stages);
  const std::int64_t heads = args.q.dim(0) * args.q.dim(1);
  const auto stage_count = static_cast<std::int64_t>(table.rows.size()) / ColumnStage::kQueries;
  Tensor out = empty(DType::f32, {heads, groups.count(), keys});
  Tensor lessening = empty(DType::f32, {heads, stage_count, ColumnStage::kQueries});
  if (table.empty_group) fill_zero(out);
  if (computes())
    cuda::column_sums({.q = args.q.raw(),
                       .k = args.k.raw(),
                       .statistics = args.statistics.data<float>(),
                       .type = args.q.dtype(),
                       .batch = static_cast<int>(args.q.dim(0)),
                       .heads = static_cast<int>(args.q.dim(1)),
                       .dim = static_cast<int>(args.q.dim(3)),
                       .queries = static_cast<int>(args.q.dim(2)),
                       .keys = keys,
                       .capacity = args.k.dim(2),
                       .stages = address<ColumnStage>(stages),
                       .rows = rows.data<std::int32_t>(),
                       .group_of = group_of.data<std::int32_t>(),
                       .stage_count = static_cast<int>(stage_count),
                       .groups = groups.count(),
                       .scale = args.scale,
                       .lessening = lessening.data<float>(),
                       .sums = out.data<float>(),
                       .hopper = hopper_},
                      stream_);
  return out;
}

void CudaBackend::select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) {
  require_choice(choice, sums.dim(0), sums.dim(1), counts.front());
  const auto keys = static_cast<int>(sums.dim(2));
  if (keys > most_selected_keys() || static_cast<int>(counts.size()) > kMostCounts)
    refuse_plan(fmt::format("it cannot choose among {} keys, {} at most", keys, most_selected_keys()));
  // The smallest choice first, then what each larger one adds.
  std::vector<int> added;
  for (std::size_t i = counts.size(); i-- > 0;)
    added.push_back(counts[i] - (i + 1 < counts.size() ? counts[i + 1] : 0));
  if (computes())
    cuda::select_keys(sums.data<float>(), sums.dim(0) * sums.dim(1), keys, added.data(), static_cast<int>(added.size()),
                      choice.data<std::int32_t>(), stream_);
}

void CudaBackend::attend_and_choose(AttentionArgs& args, const std::vector<std::int32_t>& rows,
                                    const QueryTiles& groups, int keys, const std::vector<int>& counts,
                                    Tensor& choice) {
  check_args(args, keys);
  bool single = true;
  for (int g = 0; g < groups.count(); ++g) single = single && groups.rows_in(g) == 1;
  const std::int64_t heads = args.q.dim(0) * args.q.dim(1);
  const std::int64_t stride = whole_stages(keys);
  if (older_.choice || !single || counts.size() != 1 || counts[0] > ChooseOfLogits::kMostChosen ||
      stride > ChooseOfLogits::kMostKeys || !on_hopper(args, hopper_) || !shares_out_keys(args, keys))
    return Backend::attend_and_choose(args, rows, groups, keys, counts, choice);
  const std::int64_t queries = args.statistics.dim(2);
  require_choice(choice, heads, groups.count(), counts[0]);
  const Tensor row_of = kept_rows(groups.rows);
  Tensor logits = empty(DType::f32, {heads, queries, stride});
  Tensor largest = empty(DType::f32, {heads, queries, stride / LogitRows::kGroup});
  const LogitRows logit_rows{.queries = static_cast<int>(queries),
                             .logits = logits.data<float>(),
                             .largest = largest.data<float>(),
                             .stride = stride};
  attend_in_parts(args, keys, logit_rows, rows.empty() ? Tensor() : kept_rows(rows));
  if (computes())
    choose_of_logits({.rows = logit_rows,
                      .lists = static_cast<int>(heads),
                      .groups = groups.count(),
                      .keys = keys,
                      .chosen = counts[0],
                      .row_of = row_of.data<std::int32_t>(),
                      .choice = choice.data<std::int32_t>()},
                     stream_);
}

void CudaBackend::add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) {
  check_resize(out, cache, from.grid, to.grid);
  if (computes())
    cuda::add_resized(out.raw(), out.dtype(), cache.raw(), cache.dtype(), static_cast<int>(out.dim(0)),
                      out.size() / (out.dim(0) * out.dim(1)), from, to, stream_);
}

Tensor CudaBackend::gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  const Tensor there = kept_rows(rows);
  Tensor out = empty(DType::f32, {x.dim(0), count, x.dim(2), x.dim(3)});
  if (computes())
    cuda::gather_rows(x.raw(), x.dtype(), static_cast<int>(x.dim(0)), static_cast<int>(x.dim(1)), x.dim(2) * x.dim(3),
                      there.data<std::int32_t>(), static_cast<int>(count), out.data<float>(), stream_);
  return out;
}

Tensor CudaBackend::minus_rows(const Tensor& x, const Tensor& of, const std::vector<std::int32_t>& rows) {
  if (older_.residual || x.dtype() != compute_ || of.dtype() != compute_) return Backend::minus_rows(x, of, rows);
  const Tensor there = kept_rows(rows);
  Tensor out = empty(compute_, x.shape());
  if (computes())
    cuda::minus_rows(x.raw(), of.raw(), compute_, static_cast<int>(of.dim(0)), static_cast<int>(of.dim(1)),
                     of.dim(2) * of.dim(3), there.data<std::int32_t>(), static_cast<int>(rows.size()), out.raw(),
                     stream_);
  return out;
}

Tensor CudaBackend::gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  const Tensor there = kept_rows(rows);
  Tensor out = empty(x.dtype(), {x.dim(0), x.dim(1), count, x.dim(3)});
  if (computes())
    gather_head_rows(x.raw(), x.dtype(), x.dim(0) * x.dim(1), static_cast<int>(x.dim(2)), static_cast<int>(x.dim(3)),
                     there.data<std::int32_t>(), static_cast<int>(count), out.raw(), stream_);
  return out;
}

}  // namespace sparvar::cuda
