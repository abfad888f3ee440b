// Column sums of attention: what each group of queries gives to each key (CS4A's and probe's choice of keys). Logits
// are made the other way round, keys by queries, so that the sum over queries runs along a thread's own registers.
#include "backend/cuda/kernels/column_sums.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kWarps = 8;  // of 16 keys each
constexpr int kThreads = 256;

/// What the exponents of each query are lessened by: the logarithm of its sum.
__global__ void __launch_bounds__(kThreads) find_lessening(const ColumnSums a, std::int64_t count) {
  let_next_start();
  wait_for_earlier();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i >= count) return;
  const std::int64_t each = std::int64_t{a.stage_count} * kKeys;
  const int row = a.rows[i % each];
  float lessening = INFINITY;
  if (row >= 0) {
    const float2 known = reinterpret_cast<const float2*>(a.statistics)[i / each * a.queries + row];
    lessening = known.x * kLog2E + log2f(known.y);
  }
  a.lessening[i] = lessening;
}

template <int kDim>
struct Shape {
  using T = Tile<kDim, kWarps>;
  static constexpr int kSharedBytes = (T::kQueries + 2 * kKeys) * T::kStride * 2 + 2 * kKeys * 4;
};

template <int kDim>
__global__ void __launch_bounds__((Tile<kDim, kWarps>::kThreads)) sum_columns(const ColumnSums a) {
  using T = Tile<kDim, kWarps>;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_start();
  wait_for_earlier();
  auto* const key_rows = reinterpret_cast<bf16*>(memory);
  bf16* const query_rows = key_rows + T::kQueries * T::kStride;
  auto* const lessening = reinterpret_cast<float*>(query_rows + 2 * kKeys * T::kStride);
  const auto index = static_cast<int>(blockIdx.y);
  const int first_key = static_cast<int>(blockIdx.x) * T::kQueries;
  const bf16* const q = static_cast<const bf16*>(a.q) + index * std::int64_t{a.queries} * a.dim;
  const bf16* const k = static_cast<const bf16*>(a.k) + index * a.capacity * a.dim;
  const auto load_stage = [&](int stage) {
    Rows<kDim>::template copy<T::kThreads>(kKeys, query_rows + stage % 2 * kKeys * T::kStride, q, a.dim, a.dim,
                                           [&](int i) { return __ldg(a.rows + stage * kKeys + i); });
    if (threadIdx.x < kKeys)
      lessening[stage % 2 * kKeys + threadIdx.x] =
          a.lessening[(std::int64_t{index} * a.stage_count + stage) * kKeys + threadIdx.x];
  };
  Rows<kDim>::template copy<T::kThreads>(T::kQueries, key_rows, k, a.dim, a.dim,
                                         [&](int i) { return first_key + i < a.keys ? first_key + i : -1; });
  load_stage(0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  unsigned key_parts[kDim / 16][4];
  load_rows<kDim>(key_parts, key_rows);
  GroupSums sums;
  for (int stage = 0; stage < a.stage_count; ++stage) {
    if (stage > 0) {
      wait_copies<0>();
      __syncthreads();
    }
    if (stage + 1 < a.stage_count) load_stage(stage + 1);
    commit_copies();
    float s[kKeys / 8][4];
    logits_of<kDim>(key_parts, query_rows + stage % 2 * kKeys * T::kStride, kKeys, s);
    sum_stage(a, sums, s, lessening + stage % 2 * kKeys, a.stages[stage], a.group_of + stage * kKeys, index,
              first_key + warp * 16);
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
  float sum = 0;
  for (int i = 0; i < a.stage_count * kKeys; ++i) {
    const int row = a.rows[i];
    if (row < 0) continue;
    const float* const query = q + std::int64_t{row} * a.dim;
    float logit = 0;
    for (int d = 0; d < a.dim; ++d) logit = fmaf(query[d], key_values[d * kPlainKeys + threadIdx.x], logit);
    const float* const statistics = a.statistics + (index * std::int64_t{a.queries} + row) * 2;
    sum += expf(logit * a.scale - statistics[0]) / statistics[1];
    // The group goes on with the next query, which may lie in the next stage.
    int next = i + 1;
    while (next < a.stage_count * kKeys && a.rows[next] < 0) ++next;
    if (next < a.stage_count * kKeys && a.group_of[next] == a.group_of[i]) continue;
    if (there) a.sums[(std::int64_t{index} * a.groups + a.group_of[i]) * a.keys + key] = sum;
    sum = 0;
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
  if (args.stage_count <= 0) return;
  if (args.type == DType::bf16) {
    const std::int64_t count = std::int64_t{args.batch} * args.heads * args.stage_count * kKeys;
    launch_early(find_lessening, blocks_for(count, kThreads), kThreads, 0, stream, 1, args, count);
    if (args.hopper && hopper_takes_heads_of(args.dim)) return column_sums_hopper(args, stream);
    return with_head_dim(args.dim, [&](auto dim) { launch<dim>(args, stream); });
  }
  const dim3 grid(blocks_for(args.keys, kPlainKeys), static_cast<unsigned>(args.batch * args.heads));
  const std::size_t bytes = static_cast<std::size_t>(args.dim) * kPlainKeys * sizeof(float);
  static const cudaError_t allowed = cudaFuncSetAttribute(
      sum_columns_plain, cudaFuncAttributeMaxDynamicSharedMemorySize, 256 * kPlainKeys * sizeof(float));
  (void)allowed;
  sum_columns_plain<<<grid, kPlainKeys, bytes, stream>>>(args);
  check_launch("column sums in f32");
}

}  // namespace sparvar::cuda
