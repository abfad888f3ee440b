// Attention around the tile kernels: q, k, v out of the projection, the loop over heads and tiles, the residual.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cs4a.h"
#include "backend/cpu/attention/kernels.h"
#include "backend/cpu/attention/pieces.h"
#include "backend/cpu/cpu_backend.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

void write(float* out, std::int64_t i, float x) { out[i] = x; }
void write(BFloat16* out, std::int64_t i, float x) { out[i] = to_bfloat16(x); }

/// out = rotate(x * factor); rope [D/2][2] may be null.
template <typename T>
void rotate(const float* x, int dim, float factor, const float* rope, T* out) {
  if (rope == nullptr) {
    for (int d = 0; d < dim; ++d) write(out, d, x[d] * factor);
    return;
  }
  for (int pair = 0; pair < dim / 2; ++pair) {
    const float a = x[2 * pair] * factor;
    const float b = x[2 * pair + 1] * factor;
    write(out, 2 * pair, rope[2 * pair] * a - rope[2 * pair + 1] * b);
    write(out, 2 * pair + 1, rope[2 * pair + 1] * a + rope[2 * pair] * b);
  }
}

/// 1 / max(length, 1e-12), as torch's F.normalize.
float inverse_length(const float* x, int dim) {
  float sum = 0.0F;
  for (int d = 0; d < dim; ++d) sum += x[d] * x[d];
  return 1.0F / std::max(std::sqrt(sum), 1e-12F);
}

template <typename T>
void split_rows(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) {
  const std::int64_t n = qkv.dim(1);
  const int heads = args.heads;
  const int dim = static_cast<int>(qkv.dim(-1));
  const std::int64_t capacity = k_cache.dim(2);
  parallel_ranges(qkv.dim(0) * n, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t b = row / n;
      const std::int64_t i = row % n;
      const float* rope = args.rope.defined() ? args.rope.data<float>() + i * dim : nullptr;
      for (int h = 0; h < heads; ++h) {
        const float* source = qkv.data<float>() + (row * 3 * heads + h) * dim;
        const float* k = source + heads * dim;
        const float* v = k + heads * dim;
        const std::int64_t cache_row = ((b * heads + h) * capacity + args.offset + i) * dim;
        float q_factor = args.l2_norm ? inverse_length(source, dim) : 1.0F;
        if (args.head_scale.defined()) q_factor *= args.head_scale.data<float>()[h];
        rotate(source, dim, q_factor, rope, q.data<T>() + ((b * heads + h) * n + i) * dim);
        rotate(k, dim, args.l2_norm ? inverse_length(k, dim) : 1.0F, rope, k_cache.data<T>() + cache_row);
        rotate<T>(v, dim, 1.0F, nullptr, v_cache.data<T>() + cache_row);
      }
    }
  });
}

/// Scratch memory of the calling thread, kept for the thread's life.
std::byte* thread_scratch() {
  thread_local Tensor memory = Tensor::empty(DType::u8, {static_cast<std::int64_t>(kAttentionScratchBytes)});
  return memory.data<std::byte>();
}

void check(const AttentionArgs& args) {
  const std::int64_t dim = args.q.dim(-1);
  if (dim < 1 || dim > kMaxHeadDim)
    throw Error(ErrorKind::usage,
                fmt::format("attention heads of {} channels: 1 to {} are supported", dim, kMaxHeadDim));
  if (args.k.shape() != args.v.shape() || args.k.dim(0) != args.q.dim(0) || args.k.dim(1) != args.q.dim(1) ||
      args.k.dim(3) != dim || args.k.dtype() != args.q.dtype() || args.v.dtype() != args.q.dtype())
    throw Error(ErrorKind::usage,
                fmt::format("attention: q {} {}, k {} {}, v {} {} do not fit each other", name_of(args.q.dtype()),
                            to_string(args.q.shape()), name_of(args.k.dtype()), to_string(args.k.shape()),
                            name_of(args.v.dtype()), to_string(args.v.shape())));
}

char* row_of(const Tensor& x, std::int64_t elements) {
  return static_cast<char*>(const_cast<void*>(x.raw())) + elements * static_cast<std::int64_t>(size_of(x.dtype()));
}

}  // namespace

void CpuBackend::split_qkv(const Tensor& qkv, const QkvArgs& args, Tensor& q, Tensor& k_cache, Tensor& v_cache) {
  if (qkv.rank() != 5 || qkv.dim(2) != 3 || qkv.dim(3) != args.heads || args.offset + qkv.dim(1) > k_cache.dim(2))
    throw Error(ErrorKind::usage,
                fmt::format("qkv of shape {} does not fit {} heads and a cache of shape {} from row {}",
                            to_string(qkv.shape()), args.heads, to_string(k_cache.shape()), args.offset));
  if (q.dtype() == DType::f32)
    split_rows<float>(qkv, args, q, k_cache, v_cache);
  else
    split_rows<BFloat16>(qkv, args, q, k_cache, v_cache);
}

void CpuBackend::dense_attention(AttentionArgs& args, int keys) {
  constexpr int kTile = 64;
  const QueryTiles tiles = row_tiles(static_cast<int>(args.q.dim(2)), kTile);
  attention(args, tiles, all_keys(tiles, keys));
}

void CpuBackend::attention(AttentionArgs& args, const QueryTiles& tiles, const KeyLists& lists) {
  check(args);
  const AttentionKernels& kernels = attention_kernels();
  const auto attend = args.q.dtype() == DType::f32 ? kernels.attend_f32 : kernels.attend_bf16;
  const std::vector<Piece> pieces = pieces_of(tiles);
  const std::int64_t heads = args.q.dim(1);
  const std::int64_t n = args.q.dim(2);
  const std::int64_t dim = args.q.dim(3);
  const std::int64_t capacity = args.k.dim(2);
  parallel_for(args.q.dim(0) * heads * static_cast<std::int64_t>(pieces.size()), [&](std::int64_t job) {
    const Piece& piece = pieces[job % pieces.size()];
    const std::int64_t bh = job / static_cast<std::int64_t>(pieces.size());
    const std::int64_t list = (lists.lists == 1 ? 0 : bh) * lists.tiles + piece.tile;
    attend({.q = row_of(args.q, bh * n * dim),
            .q_stride = dim,
            .rows = tiles.rows.data() + piece.first,
            .row_count = piece.count,
            .k = row_of(args.k, bh * capacity * dim),
            .k_stride = dim,
            .v = row_of(args.v, bh * capacity * dim),
            .v_stride = dim,
            .runs = lists.runs.data() + lists.offset[list],
            .run_count = lists.offset[list + 1] - lists.offset[list],
            .head_dim = static_cast<int>(dim),
            .scale = args.scale,
            .out = row_of(args.out, (bh / heads * n * heads + bh % heads) * dim),
            .out_stride = heads * dim,
            .statistics = args.statistics.defined() ? args.statistics.data<float>() + bh * n * 2 : nullptr},
           thread_scratch());
  });
}

namespace {

class CpuLists final : public AttentionLists {
 public:
  CpuLists(QueryTiles tiles_, KeyLists lists_) : tiles(std::move(tiles_)), lists(std::move(lists_)) {
    for (const KeyRun& run : lists.runs) end = std::max<std::int64_t>(end, run.begin + run.count);
  }
  QueryTiles tiles;
  KeyLists lists;
  std::int64_t end = 0;  // one more than the largest key
};

}  // namespace

AttentionListsPtr CpuBackend::prepare_lists(const QueryTiles& tiles, const KeyLists& lists) {
  require_sound(tiles, lists);
  return std::make_shared<CpuLists>(tiles, lists);
}

void CpuBackend::attention(AttentionArgs& args, const AttentionLists& lists) {
  const auto& own = dynamic_cast<const CpuLists&>(lists);
  if (own.end > args.k.dim(2))
    throw Error(ErrorKind::usage, fmt::format("lists of keys up to {} do not fit a cache of shape {}", own.end - 1,
                                              to_string(args.k.shape())));
  attention(args, own.tiles, own.lists);
}

namespace {

class CpuRecipe final : public AttentionRecipe {
 public:
  explicit CpuRecipe(ListRecipe recipe_) : recipe(std::move(recipe_)) {}
  ListRecipe recipe;
};

}  // namespace

AttentionRecipePtr CpuBackend::prepare_recipe(const ListRecipe& recipe) { return std::make_shared<CpuRecipe>(recipe); }

void CpuBackend::attention(AttentionArgs& args, const AttentionRecipe& recipe, const Tensor& choice, Tensor& pairs) {
  const ListRecipe& own = dynamic_cast<const CpuRecipe&>(recipe).recipe;
  if (choice.rank() != 3 || choice.dim(2) < own.chosen || own.keys > args.k.dim(2))
    throw Error(ErrorKind::usage,
                fmt::format("a choice of keys {} does not fit lists of {} of {} keys in a cache {}",
                            to_string(choice.shape()), own.chosen, own.keys, to_string(args.k.shape())));
  const KeyLists lists = follow(own, choice);
  if (pairs.defined())
    for (int list = 0; list < lists.lists; ++list)
      for (int tile = 0; tile < lists.tiles; ++tile)
        *pairs.data<std::int64_t>() += lists.keys_in(list, tile) * own.tiles.rows_in(tile);
  attention(args, own.tiles, lists);
}

void CpuBackend::select_keys(const Tensor& sums, const std::vector<int>& counts, Tensor& choice) {
  require_choice(choice, sums.dim(0), sums.dim(1), counts.front());
  const Selection selection =
      sparvar::select_keys(sums.data<float>(), static_cast<int>(sums.dim(0)), static_cast<int>(sums.dim(1)),
                           static_cast<int>(sums.dim(2)), counts.front());
  std::copy(selection.keys.begin(), selection.keys.end(), choice.data<std::int32_t>());
}

Tensor CpuBackend::column_sums(const AttentionArgs& args, const QueryTiles& groups, int keys) {
  check(args);
  const AttentionKernels& kernels = attention_kernels();
  const auto columns = args.q.dtype() == DType::f32 ? kernels.columns_f32 : kernels.columns_bf16;
  const std::int64_t heads = args.q.dim(0) * args.q.dim(1);
  const std::int64_t n = args.q.dim(2);
  const std::int64_t dim = args.q.dim(3);
  const std::int64_t blocks = (keys + kColumnKeys - 1) / kColumnKeys;
  Tensor out = Tensor::empty(DType::f32, {heads, groups.count(), keys});
  parallel_for(heads * blocks, [&](std::int64_t job) {
    const std::int64_t bh = job / blocks;
    const int first = static_cast<int>(job % blocks) * kColumnKeys;
    columns({.q = row_of(args.q, bh * n * dim),
             .q_stride = dim,
             .statistics = args.statistics.data<float>() + bh * n * 2,
             .k = row_of(args.k, (bh * args.k.dim(2) + first) * dim),
             .k_stride = dim,
             .key_count = std::min(keys - first, kColumnKeys),
             .group_offset = groups.offset.data(),
             .group_rows = groups.rows.data(),
             .group_count = groups.count(),
             .head_dim = static_cast<int>(dim),
             .scale = args.scale,
             .out = out.data<float>() + bh * groups.count() * keys + first,
             .out_stride = keys},
            thread_scratch());
  });
  return out;
}

namespace {

/// Source rows and weight of one output position: half-pixel centres, clamped (PyTorch's align_corners = false).
struct Tap {
  int low;
  int high;
  float weight;  // of high
};

std::vector<Tap> taps(int from, int to) {
  std::vector<Tap> out(static_cast<std::size_t>(to));
  const float ratio = static_cast<float>(from) / static_cast<float>(to);
  for (int i = 0; i < to; ++i) {
    const float centre = std::max((static_cast<float>(i) + 0.5F) * ratio - 0.5F, 0.0F);
    const int low = std::min(static_cast<int>(centre), from - 1);
    out[i] = {low, std::min(low + 1, from - 1), centre - static_cast<float>(low)};
  }
  return out;
}

float read(const float* x, std::int64_t i) { return x[i]; }
float read(const BFloat16* x, std::int64_t i) { return to_float(x[i]); }

template <typename T>
void add_rows(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) {
  const std::vector<Tap> rows = taps(from.grid.h, to.grid.h);
  const std::vector<Tap> columns = taps(from.grid.w, to.grid.w);
  const std::int64_t channels = out.size() / (out.dim(0) * to.grid.tokens());
  parallel_for(out.dim(0) * to.grid.h, [&](std::int64_t job) {
    const std::int64_t b = job / to.grid.h;
    const int row = static_cast<int>(job % to.grid.h);
    const Tap& y = rows[row];
    const float* map = cache.data<float>() + b * from.grid.tokens() * channels;
    for (int column = 0; column < to.grid.w; ++column) {
      const Tap& x = columns[column];
      const float w11 = y.weight * x.weight;
      const float w10 = y.weight - w11;
      const float w01 = x.weight - w11;
      const float w00 = 1.0F - y.weight - w01;
      T* target = out.data<T>() + (b * to.grid.tokens() + to.place(row, column)) * channels;
      const float* a = map + from.place(y.low, x.low) * channels;
      const float* c = map + from.place(y.low, x.high) * channels;
      const float* d = map + from.place(y.high, x.low) * channels;
      const float* e = map + from.place(y.high, x.high) * channels;
      for (std::int64_t i = 0; i < channels; ++i)
        write(target, i, read(target, i) + w00 * a[i] + w01 * c[i] + w10 * d[i] + w11 * e[i]);
    }
  });
}

}  // namespace

void CpuBackend::add_resized(Tensor& out, const Tensor& cache, const TokenMap& from, const TokenMap& to) {
  if (out.dim(1) != to.grid.tokens() || cache.dim(1) != from.grid.tokens() || cache.dim(0) != out.dim(0))
    throw Error(ErrorKind::usage,
                fmt::format("cache {} of a {}x{} map does not fit {} of a {}x{} map", to_string(cache.shape()),
                            from.grid.h, from.grid.w, to_string(out.shape()), to.grid.h, to.grid.w));
  if (out.dtype() == DType::f32)
    add_rows<float>(out, cache, from, to);
  else
    add_rows<BFloat16>(out, cache, from, to);
}

Tensor CpuBackend::gather_rows(const Tensor& x, const std::vector<std::int32_t>& rows) {
  const std::int64_t count = static_cast<std::int64_t>(rows.size());
  const std::int64_t channels = x.dim(2) * x.dim(3);
  Tensor out = Tensor::empty(DType::f32, {x.dim(0), count, x.dim(2), x.dim(3)});
  for (std::int64_t i = 0; i < x.dim(0) * count; ++i) {
    const std::int64_t source = (i / count * x.dim(1) + rows[i % count]) * channels;
    for (std::int64_t c = 0; c < channels; ++c)
      out.data<float>()[i * channels + c] =
          x.dtype() == DType::f32 ? x.data<float>()[source + c] : to_float(x.data<BFloat16>()[source + c]);
  }
  return out;
}

Tensor CpuBackend::gather_queries(const Tensor& x, const std::vector<std::int32_t>& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  Tensor out = Tensor::empty(x.dtype(), {x.dim(0), x.dim(1), count, x.dim(3)});
  const std::int64_t bytes = x.dim(3) * static_cast<std::int64_t>(size_of(x.dtype()));
  for (std::int64_t i = 0; i < x.dim(0) * x.dim(1) * count; ++i)
    std::memcpy(static_cast<char*>(out.raw()) + i * bytes,
                static_cast<const char*>(x.raw()) + (i / count * x.dim(2) + rows[i % count]) * bytes, bytes);
  return out;
}

void CpuBackend::subtract(const Tensor& a, const Tensor& b, Tensor& out) {
  if (a.size() != b.size() || a.size() != out.size())
    throw Error(ErrorKind::usage, fmt::format("{}, {} and their difference {} differ in size", to_string(a.shape()),
                                              to_string(b.shape()), to_string(out.shape())));
  const auto value = [](const Tensor& x, std::int64_t i) {
    return x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<BFloat16>()[i]);
  };
  parallel_ranges(a.size(), 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float difference = value(a, i) - value(b, i);
      if (out.dtype() == DType::f32)
        out.data<float>()[i] = difference;
      else
        out.data<BFloat16>()[i] = to_bfloat16(difference);
    }
  });
}

}  // namespace sparvar
