// Rows of maps: gathered, resized and added, put together from parts.
#include <algorithm>
#include <type_traits>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/resize.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) gather(const From* x, std::int64_t n, std::int64_t width,
                                                   const std::int32_t* rows, int count, std::int64_t total, To* out) {
  let_next_start();
  wait_for_earlier();
  for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row = i / width;
    out[i] = rounded<To>(read(x[(row / count * n + rows[row % count]) * width + i % width]));
  }
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Some {
  T of[kCount];
};

/// out = x - rows of `of`, kCount channels to a thread.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) subtract(const T* x, const T* of, std::int64_t n, std::int64_t vectors,
                                                     const std::int32_t* rows, int count, std::int64_t total, T* out) {
  let_next_start();
  wait_for_earlier();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i >= total) return;
  using V = Some<T, kCount>;
  const std::int64_t row = i / vectors;
  V a = reinterpret_cast<const V*>(x)[i];
  const V b = reinterpret_cast<const V*>(of)[(row / count * n + rows[row % count]) * vectors + i % vectors];
#pragma unroll
  for (int j = 0; j < kCount; ++j) a.of[j] = rounded<T>(read(a.of[j]) - read(b.of[j]));
  reinterpret_cast<V*>(out)[i] = a;
}

unsigned some_blocks(std::int64_t count) { return std::min(blocks_for(count, kThreads), 8192U); }

/// kCount channels to a thread, a token to blockIdx.y, a picture to blockIdx.z.
template <typename T, typename Cache, int kCount>
__global__ void __launch_bounds__(kThreads)
    resize(T* out, const Cache* cache, int vectors, TokenMap from, TokenMap to) {
  let_next_start();
  wait_for_earlier();
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= vectors) return;
  const auto token = static_cast<int>(blockIdx.y);
  const int row = token / to.grid.w, column = token % to.grid.w;
  const Corners corners(row, column, from.grid, to.grid, [&](int up, int across) { return from.place(up, across); });
  using V = Some<T, kCount>;
  using C = Some<Cache, kCount>;
  const auto* const map =
      reinterpret_cast<const C*>(cache) + std::int64_t{blockIdx.z} * from.grid.h * from.grid.w * vectors + i;
  const auto at = [&](int corner) { return map[std::int64_t{corners.token[corner]} * vectors]; };
  const C a = at(0), b = at(1), c = at(2), d = at(3);
  V* const target = reinterpret_cast<V*>(out) +
                    (std::int64_t{blockIdx.z} * to.grid.h * to.grid.w + to.place(row, column)) * vectors + i;
  V sum = *target;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    sum.of[j] = rounded<T>(
        plus_corners(read(sum.of[j]), corners.weight, read(a.of[j]), read(b.of[j]), read(c.of[j]), read(d.of[j])));
  *target = sum;
}

/// kCount channels to a thread; `vectors` of them to a head.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    merge(const T* partial, const float* partial_statistics, int heads, int vectors, int queries, int parts, T* out,
          float* statistics, int total) {
  let_next_start();
  wait_for_earlier();
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= total) return;
  using V = Some<T, kCount>;
  const int width = heads * vectors;
  const int channel = i % width;
  const int query = i / width % queries;
  const int batch = i / width / queries;
  const std::int64_t index = std::int64_t{batch} * heads + channel / vectors;
  const auto* const known = reinterpret_cast<const float2*>(partial_statistics) + index * parts * queries + query;
  const auto* const from =
      reinterpret_cast<const V*>(partial) + (std::int64_t{batch} * parts * queries + query) * width + channel;
  float largest = -INFINITY;
  for (int p = 0; p < parts; ++p) largest = fmaxf(largest, known[std::int64_t{p} * queries].x);
  float sum = 0;
  float value[kCount] = {};
#pragma unroll 4
  for (int p = 0; p < parts; ++p) {
    const float2 of = known[std::int64_t{p} * queries];
    const V x = from[std::int64_t{p} * queries * width];
    const float weight = of.y > 0 ? expf(of.x - largest) * of.y : 0.0F;
    sum += weight;
#pragma unroll
    for (int j = 0; j < kCount; ++j) value[j] += weight * read(x.of[j]);
  }
  V merged;
#pragma unroll
  for (int j = 0; j < kCount; ++j) merged.of[j] = rounded<T>(sum > 0 ? value[j] / sum : 0.0F);
  reinterpret_cast<V*>(out)[i] = merged;
  if (channel % vectors == 0) {
    float* const to = statistics + (index * queries + query) * 2;
    to[0] = largest;
    to[1] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) spread(const float* log_sums, std::int64_t count, float2* statistics) {
  let_next_start();
  wait_for_earlier();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i < count) statistics[i] = make_float2(log_sums[i], 1.0F);
}

template <typename T, typename Cache, int kCount>
void launch_resize(T* out, const Cache* cache, int batch, std::int64_t width, const TokenMap& from, const TokenMap& to,
                   cudaStream_t stream) {
  const int vectors = static_cast<int>(width / kCount);
  const dim3 grid(blocks_for(vectors, kThreads), static_cast<unsigned>(to.grid.tokens()), static_cast<unsigned>(batch));
  launch_early(resize<T, Cache, kCount>, grid, kThreads, 0, stream, 1, out, cache, vectors, from, to);
}

}  // namespace

void gather_rows(const void* x, DType type, int batch, int n, std::int64_t width, const std::int32_t* rows, int count,
                 float* out, cudaStream_t stream) {
  const std::int64_t total = std::int64_t{batch} * count * width;
  if (total <= 0) return;
  with_type(type, [&](auto example) {
    using T = decltype(example);
    launch_early(gather<T, float>, some_blocks(total), kThreads, 0, stream, 1, static_cast<const T*>(x),
                 std::int64_t{n}, width, rows, count, total, out);
  });
  check_launch("gather rows");
}

void gather_head_rows(const void* x, DType type, std::int64_t heads, int n, int dim, const std::int32_t* rows,
                      int count, void* out, cudaStream_t stream) {
  const std::int64_t total = heads * count * dim;
  if (total <= 0) return;
  with_type(type, [&](auto example) {
    using T = decltype(example);
    launch_early(gather<T, T>, some_blocks(total), kThreads, 0, stream, 1, static_cast<const T*>(x), std::int64_t{n},
                 std::int64_t{dim}, rows, count, total, static_cast<T*>(out));
  });
  check_launch("gather rows of heads");
}

void minus_rows(const void* x, const void* of, DType type, int batch, int n, std::int64_t width,
                const std::int32_t* rows, int count, void* out, cudaStream_t stream) {
  if (std::int64_t{batch} * count * width <= 0) return;
  with_type(type, [&](auto example) {
    using T = decltype(example);
    const auto launch = [&](auto each) {
      constexpr int kCount = decltype(each)::value;
      const std::int64_t vectors = width / kCount;
      const std::int64_t total = std::int64_t{batch} * count * vectors;
      launch_early(subtract<T, kCount>, blocks_for(total, kThreads), kThreads, 0, stream, 1, static_cast<const T*>(x),
                   static_cast<const T*>(of), std::int64_t{n}, vectors, rows, count, total, static_cast<T*>(out));
    };
    constexpr int kWide = 16 / sizeof(T);
    if (width % kWide == 0)
      launch(std::integral_constant<int, kWide>{});
    else
      launch(std::integral_constant<int, 1>{});
  });
  check_launch("subtract rows");
}

void add_resized(void* out, DType type, const void* cache, DType cache_type, int batch, std::int64_t width,
                 const TokenMap& from, const TokenMap& to, cudaStream_t stream) {
  if (batch <= 0 || width <= 0) return;
  if (to.grid.tokens() > 65535 || batch > 65535)
    throw Error(ErrorKind::usage, "maps are resized on a GPU to 65535 tokens at most");
  with_type(type, [&](auto first) {
    with_type(cache_type, [&](auto second) {
      using T = decltype(first);
      using C = decltype(second);
      constexpr int kCount = 16 / sizeof(T);
      if (width % kCount == 0)
        launch_resize<T, C, kCount>(static_cast<T*>(out), static_cast<const C*>(cache), batch, width, from, to, stream);
      else
        launch_resize<T, C, 1>(static_cast<T*>(out), static_cast<const C*>(cache), batch, width, from, to, stream);
    });
  });
  check_launch("add a resized map");
}

void merge_parts(const void* partial, const float* partial_statistics, DType type, int batch, int heads, int dim,
                 int queries, int parts, void* out, float* statistics, cudaStream_t stream) {
  const std::int64_t numbers = std::int64_t{batch} * queries * heads * dim;
  if (numbers <= 0) return;
  with_type(type, [&](auto example) {
    using T = decltype(example);
    const auto launch = [&](auto each) {
      constexpr int kCount = decltype(each)::value;
      const auto total = static_cast<int>(numbers / kCount);
      launch_early(merge<T, kCount>, blocks_for(total, kThreads), kThreads, 0, stream, 1,
                   static_cast<const T*>(partial), partial_statistics, heads, dim / kCount, queries, parts,
                   static_cast<T*>(out), statistics, total);
    };
    constexpr int kWide = 16 / sizeof(T);
    if (dim % kWide == 0)
      launch(std::integral_constant<int, kWide>{});
    else
      launch(std::integral_constant<int, 1>{});
  });
  check_launch("merge parts");
}

void spread_log_sums(const float* log_sums, std::int64_t count, float* statistics, cudaStream_t stream) {
  if (count <= 0) return;
  launch_early(spread, blocks_for(count, kThreads), kThreads, 0, stream, 1, log_sums, count,
               reinterpret_cast<float2*>(statistics));
  check_launch("spread log sums");
}

}  // namespace sparvar::cuda
