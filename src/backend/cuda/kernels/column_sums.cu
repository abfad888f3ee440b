// Column sums of attention: what each group of queries gives to each key (CS4A's and probe's choice of keys). Logits
// are made the other way round, keys by queries, so that the sum over queries runs along a thread's own registers.
#include <algorithm>

#include "backend/cuda/kernels/attention_tile.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kWarps = 8;  // of 16 keys each

/// The columns of a stage: which group each query is of, and what its exponent is lessened by.
struct Columns {
  int group[kKeys];
  float lessening[kKeys];  // infinite where there is no query
};

template <int kDim>
struct Shape {
  using T = Tile<kDim, kWarps>;
  static constexpr int kSharedBytes =
      (T::kQueries + 2 * kKeys) * T::kStride * 2 + 2 * static_cast<int>(sizeof(Columns));
};

__device__ inline void load_columns(const ColumnSums& a, int index, int first, int count, Columns& to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kKeys) return;
  const bool there = first + i < count;
  to.group[i] = there ? __ldg(a.group_of + first + i) : -1;
  float lessening = INFINITY;
  if (there) {
    const float2 statistics =
        reinterpret_cast<const float2*>(a.statistics)[index * std::int64_t{a.queries} + __ldg(a.rows + first + i)];
    lessening = statistics.x * kLog2E + log2f(statistics.y);
  }
  to.lessening[i] = lessening;
}

/// Sums of one group of this warp's keys so far; whole groups are written.
struct Sums {
  float of[2] = {0, 0};  // keys lane / 4 and lane / 4 + 8

  __device__ void write(const ColumnSums& a, int index, int group, int key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = of[half];
      x += __shfl_xor_sync(0xffffffffU, x, 1);
      x += __shfl_xor_sync(0xffffffffU, x, 2);
      const int at = key + lane / 4 + 8 * half;
      if (lane % 4 == 0 && at < a.keys) a.sums[(std::int64_t{index} * a.groups + group) * a.keys + at] = x;
      of[half] = 0;
    }
  }
};

/// Adds the weights of columns [begin, end).
__device__ inline void add_columns(Sums& sums, const float (&s)[kKeys / 8][4], int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = n * 8 + lane % 4 * 2 + j % 2;
      sums.of[j / 2] += column >= begin && column < end ? s[n][j] : 0.0F;
    }
}

/// Every column is a group of its own.
__device__ inline void write_columns(const ColumnSums& a, const float (&s)[kKeys / 8][4], const Columns& columns,
                                     int index, int key, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = n * 8 + lane % 4 * 2 + j % 2;
      const int at = key + lane / 4 + j / 2 * 8;
      if (column < count && at < a.keys)
        a.sums[(std::int64_t{index} * a.groups + columns.group[column]) * a.keys + at] = s[n][j];
    }
}

template <int kDim>
__global__ void __launch_bounds__((Tile<kDim, kWarps>::kThreads)) sum_columns(const ColumnSums a) {
  using T = Tile<kDim, kWarps>;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_start();
  wait_for_earlier();
  auto* const key_rows = reinterpret_cast<bf16*>(memory);
  bf16* const query_rows = key_rows + T::kQueries * T::kStride;
  auto* const columns = reinterpret_cast<Columns*>(query_rows + 2 * kKeys * T::kStride);
  const auto index = static_cast<int>(blockIdx.y);
  const int first_key = static_cast<int>(blockIdx.x) * T::kQueries;
  const bf16* const q = static_cast<const bf16*>(a.q) + index * std::int64_t{a.queries} * a.dim;
  const bf16* const k = static_cast<const bf16*>(a.k) + index * a.capacity * a.dim;
  const auto load_stage = [&](int first) {
    const int buffer = first / kKeys % 2;
    Rows<kDim>::template copy<kKeys, T::kThreads>(
        query_rows + buffer * kKeys * T::kStride, q, a.dim, a.dim,
        [&](int i) { return first + i < a.row_count ? __ldg(a.rows + first + i) : -1; });
    load_columns(a, index, first, a.row_count, columns[buffer]);
  };
  Rows<kDim>::template copy<T::kQueries, T::kThreads>(
      key_rows, k, a.dim, a.dim, [&](int i) { return first_key + i < a.keys ? first_key + i : -1; });
  load_stage(0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned key_parts[kDim / 16][4];
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d)
    load_matrices(key_parts[d],
                  shared_address(key_rows + (warp * 16 + lane % 16) * T::kStride + d * 16 + lane / 16 * 8));
  const int key = first_key + warp * 16;
  const float scale = a.scale * kLog2E;
  Sums sums;
  for (int first = 0; first < a.row_count; first += kKeys) {
    if (first > 0) {
      wait_copies<0>();
      __syncthreads();
    }
    if (first + kKeys < a.row_count) load_stage(first + kKeys);
    commit_copies();
    const Columns& here = columns[first / kKeys % 2];
    float s[kKeys / 8][4];
    logits_of<kDim>(key_parts, query_rows + first / kKeys % 2 * kKeys * T::kStride, s);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        s[n][j] = power_of_two(fmaf(s[n][j], scale, -here.lessening[n * 8 + lane % 4 * 2 + j % 2]));
    const int count = min(kKeys, a.row_count - first);
    if (a.single) {
      write_columns(a, s, here, index, key, count);
      continue;
    }
    for (int begin = 0; begin < count;) {
      const int group = here.group[begin];
      const int last = __ldg(a.offset + group + 1) - first;
      const int end = min(last, count);
      add_columns(sums, s, begin, end);
      if (last <= count) sums.write(a, index, group, key);
      begin = end;
    }
  }
}

constexpr int kPlainKeys = 128;

/// f32, for comparing: a key to a thread, queries one after the other.
__global__ void __launch_bounds__(kPlainKeys) sum_columns_plain(const ColumnSums a) {
  extern __shared__ float key_values[];  // [dim][keys]
  const auto index = static_cast<int>(blockIdx.y);
  const int key = static_cast<int>(blockIdx.x) * kPlainKeys + static_cast<int>(threadIdx.x);
  const bool there = key < a.keys;
  const float* const q = static_cast<const float*>(a.q) + index * std::int64_t{a.queries} * a.dim;
  const float* const k = static_cast<const float*>(a.k) + (index * a.capacity + key) * a.dim;
  for (int d = 0; d < a.dim; ++d) key_values[d * kPlainKeys + threadIdx.x] = there ? k[d] : 0.0F;
  for (int group = 0; group < a.groups; ++group) {
    float sum = 0;
    for (int i = a.offset[group]; i < a.offset[group + 1]; ++i) {
      const int row = a.rows[i];
      const float* const query = q + std::int64_t{row} * a.dim;
      float logit = 0;
      for (int d = 0; d < a.dim; ++d) logit = fmaf(query[d], key_values[d * kPlainKeys + threadIdx.x], logit);
      const float* const statistics = a.statistics + (index * std::int64_t{a.queries} + row) * 2;
      sum += expf(logit * a.scale - statistics[0]) / statistics[1];
    }
    if (there) a.sums[(std::int64_t{index} * a.groups + group) * a.keys + key] = sum;
  }
}

template <int kDim>
void launch(const ColumnSums& args, cudaStream_t stream) {
  using T = Tile<kDim, kWarps>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(sum_columns<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<kDim>::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const dim3 grid(blocks_for(args.keys, T::kQueries), static_cast<unsigned>(args.batch * args.heads));
  launch_early(sum_columns<kDim>, grid, T::kThreads, Shape<kDim>::kSharedBytes, stream, 1, args);
  check_launch("column sums");
}

}  // namespace

void column_sums(const ColumnSums& args, cudaStream_t stream) {
  if (args.keys <= 0 || args.groups <= 0 || args.batch * args.heads <= 0) return;
  if (args.type == DType::bf16) return with_head_dim(args.dim, [&](auto dim) { launch<dim>(args, stream); });
  const dim3 grid(blocks_for(args.keys, kPlainKeys), static_cast<unsigned>(args.batch * args.heads));
  const std::size_t bytes = static_cast<std::size_t>(args.dim) * kPlainKeys * sizeof(float);
  static const cudaError_t allowed = cudaFuncSetAttribute(
      sum_columns_plain, cudaFuncAttributeMaxDynamicSharedMemorySize, 256 * kPlainKeys * sizeof(float));
  (void)allowed;
  sum_columns_plain<<<grid, kPlainKeys, bytes, stream>>>(args);
  check_launch("column sums in f32");
}

}  // namespace sparvar::cuda
