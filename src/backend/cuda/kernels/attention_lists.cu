// Attention of tiles of queries to lists of keys, the one kernel of every sparse plan where there is no Hopper
// (attention_hopper.cu): the rows of a tile and of its keys are gathered while they are copied to shared memory, where
// they lie side by side; from there on it is dense attention.
#include <algorithm>

#include "backend/cuda/kernels/attention_tile.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {

void list_attention_f32(const ListAttention& args, cudaStream_t stream);

namespace {

template <int kDim, int kWarps>
__global__ void __launch_bounds__((Tile<kDim, kWarps>::kThreads)) attend_lists(const ListAttention a) {
  using T = Tile<kDim, kWarps>;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_start();
  wait_for_earlier();
  auto* const q_rows = reinterpret_cast<bf16*>(memory);
  bf16* const k_rows = q_rows + T::kQueries * T::kStride;  // k and v of a stage, then of the other one
  bf16* const v_rows = k_rows + kKeys * T::kStride;
  const auto index = static_cast<int>(blockIdx.y);  // of batch and head
  const int batch = index / a.heads;
  const int head = index % a.heads;
  const TileRows tile = a.tiles[blockIdx.x];
  const KeyRange range = a.ranges[(a.own_lists ? index * a.list_tiles : 0) + tile.list];
  const std::int32_t* const queries = a.rows + tile.first_query;
  const std::int32_t* const keys = a.keys + range.first;
  const bf16* q = static_cast<const bf16*>(a.q) + index * std::int64_t{a.queries} * a.dim;
  const bf16* k = static_cast<const bf16*>(a.k) + index * a.capacity * a.dim;
  const bf16* v = static_cast<const bf16*>(a.v) + index * a.capacity * a.dim;
  const auto query_of = [&](int i) { return i < tile.queries ? __ldg(queries + i) : -1; };
  const auto load_stage = [&](int stage) {
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    const auto key_of = [&](int i) { return stage * kKeys + i < range.keys ? __ldg(keys + stage * kKeys + i) : -1; };
    Rows<kDim>::template copy<T::kThreads>(kKeys, k_rows + buffer, k, a.dim, a.dim, key_of);
    Rows<kDim>::template copy<T::kThreads>(kKeys, v_rows + buffer, v, a.dim, a.dim, key_of);
  };

  const int stages = (range.keys + kKeys - 1) / kKeys;
  Rows<kDim>::template copy<T::kThreads>(T::kQueries, q_rows, q, a.dim, a.dim, query_of);
  if (stages > 0) load_stage(0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  unsigned q_parts[kDim / 16][4];
  load_rows<kDim>(q_parts, q_rows);

  Running<kDim> running;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage > 0) {
      wait_copies<0>();
      __syncthreads();  // everybody has left the buffer that is written next
    }
    if (stage + 1 < stages) load_stage(stage + 1);
    commit_copies();
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    const int left = range.keys - stage * kKeys;
    float s[kKeys / 8][4];
    logits_of<kDim>(q_parts, k_rows + buffer, left, s);
    renormalise<kDim>(running, s, a.scale * kLog2E, left);
    add_values<kDim>(running, s, v_rows + buffer, left);
  }
  const std::int64_t width = std::int64_t{a.heads} * a.dim;
  write<kDim>(running, q_rows + warp * 16 * T::kStride,
              static_cast<bf16*>(a.out) + (std::int64_t{batch} * a.out_queries + tile.shift) * width + head * a.dim,
              width, a.dim,
              a.statistics == nullptr ? nullptr : a.statistics + (index * std::int64_t{a.out_queries} + tile.shift) * 2,
              [&](int i) { return query_of(warp * 16 + i); });
}

template <int kDim, int kWarps>
void launch(const ListAttention& args, cudaStream_t stream) {
  using T = Tile<kDim, kWarps>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(attend_lists<kDim, kWarps>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const dim3 grid(static_cast<unsigned>(args.tile_count), static_cast<unsigned>(args.batch * args.heads));
  launch_early(attend_lists<kDim, kWarps>, grid, T::kThreads, T::kSharedBytes, stream, 1, args);
  check_launch("attention of lists");
}

template <int kDim>
void launch(const ListAttention& args, cudaStream_t stream) {
  args.most_queries <= 64 ? launch<kDim, 4>(args, stream) : launch<kDim, 8>(args, stream);
}

}  // namespace

void list_attention(const ListAttention& args, cudaStream_t stream) {
  if (args.tile_count <= 0 || args.batch * args.heads <= 0) return;
  const bool hopper = args.type == DType::bf16 && args.hopper && hopper_takes_heads_of(args.dim);
  if (args.batch * args.heads > 65535 || args.most_queries > (hopper ? TileRows::kMostHopper : TileRows::kMost))
    throw Error(ErrorKind::usage, "attention of lists takes tiles of 128 queries and 65535 heads at most");
  if (hopper) return list_attention_hopper(args, stream);
  if (args.type == DType::f32) return list_attention_f32(args, stream);
  with_head_dim(args.dim, [&](auto dim) { launch<dim>(args, stream); });
}

}  // namespace sparvar::cuda
