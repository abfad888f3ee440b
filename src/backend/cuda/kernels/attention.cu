// Dense attention in bf16: all keys stream through shared memory in two stages.
#include <algorithm>

#include "backend/cuda/kernels/attention_tile.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {

void dense_attention_f32(const DenseAttention& args, cudaStream_t stream);

namespace {

constexpr int sixteens(int x) { return (x + 15) / 16 * 16; }

/// Rows in shared memory of a block, of queries and of the keys of a stage. Where one stage holds all keys it has room
/// for those that there are, so that it may stand beside the blocks of few_rows.cu before they are done.
template <int kDim, int kWarps, bool kOneStage>
struct Room {
  int queries, keys;
  __host__ __device__ explicit Room(const DenseAttention& a)
      : queries(kOneStage && a.queries < Tile<kDim, kWarps>::kQueries ? sixteens(a.queries)
                                                                      : Tile<kDim, kWarps>::kQueries),
        keys(kOneStage ? sixteens(a.most_keys) : kKeys) {}
  __host__ __device__ int bytes() const { return (queries + (kOneStage ? 2 : 4) * keys) * Rows<kDim>::kStride * 2; }
};

/// kOneStage: all keys fit one stage (texts, the first scales); a block then needs so little that several share a
/// multiprocessor.
template <int kDim, int kWarps, bool kOneStage>
__global__ void __launch_bounds__((Tile<kDim, kWarps>::kThreads), kOneStage ? 4 : 1) attend(const DenseAttention a) {
  using T = Tile<kDim, kWarps>;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_start();
  const Room<kDim, kWarps, kOneStage> room(a);
  auto* const q_rows = reinterpret_cast<bf16*>(memory);
  // k and v of a stage, then of the other one, which is not there where one holds all keys.
  bf16* const k_rows = q_rows + room.queries * T::kStride;
  bf16* const v_rows = k_rows + room.keys * T::kStride;
  const int head = static_cast<int>(blockIdx.y) % a.heads;
  const int batch = static_cast<int>(blockIdx.y) / a.heads;
  const int first_query = static_cast<int>(blockIdx.x) * T::kQueries;
  const bf16* const q = static_cast<const bf16*>(a.q) + batch * a.q_batch + head * a.q_head;
  std::int64_t kv = batch * a.k_batch + head * a.k_head;
  int keys = a.keys;
  const auto load_stage = [&](int stage) {
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    const auto key_of = [&](int i) { return stage * kKeys + i < keys ? stage * kKeys + i : -1; };
    const auto* const k = static_cast<const bf16*>(a.k) + kv;
    const auto* const v = static_cast<const bf16*>(a.v) + kv;
    Rows<kDim>::template copy<T::kThreads>(room.keys, k_rows + buffer, k, a.k_row, a.dim, key_of);
    Rows<kDim>::template copy<T::kThreads>(room.keys, v_rows + buffer, v, a.k_row, a.dim, key_of);
  };
  const auto load_first = [&] {
    if (a.cu_lengths != nullptr) {
      const int first = a.cu_lengths[batch];
      keys = a.cu_lengths[batch + 1] - first;
      kv += first * a.k_row;
    }
    if (keys > 0) load_stage(0);
  };
  if (a.settled) load_first();
  wait_for_earlier();
  if (!a.settled) load_first();
  const int stages = (keys + kKeys - 1) / kKeys;
  const auto query_of = [&](int i) { return first_query + i < a.queries ? first_query + i : -1; };
  Rows<kDim>::template copy<T::kThreads>(room.queries, q_rows, q, a.q_row, a.dim, query_of);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (kOneStage && warp * 16 >= room.queries) return;
  unsigned q_parts[kDim / 16][4];
  load_rows<kDim>(q_parts, q_rows);

  Running<kDim> running;
  const auto attend_stage = [&](int stage) {
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    const int left = keys - stage * kKeys;
    float s[kKeys / 8][4];
    logits_of<kDim>(q_parts, k_rows + buffer, left, s);
    renormalise<kDim>(running, s, a.scale * kLog2E, left);
    add_values<kDim>(running, s, v_rows + buffer, left);
  };
  if constexpr (kOneStage) {
    if (stages > 0) attend_stage(0);
  } else {
    for (int stage = 0; stage < stages; ++stage) {
      if (stage > 0) {
        wait_copies<0>();
        __syncthreads();  // everybody has left the buffer that is written next
      }
      if (stage + 1 < stages) load_stage(stage + 1);
      commit_copies();
      attend_stage(stage);
    }
  }
  const std::int64_t index = std::int64_t{batch} * a.heads + head;
  write<kDim>(running, q_rows + warp * 16 * T::kStride,
              static_cast<bf16*>(a.out) + batch * a.out_batch + head * a.out_head, a.out_row, a.dim,
              a.statistics == nullptr ? nullptr : a.statistics + index * a.queries * 2,
              [&](int i) { return query_of(warp * 16 + i); });
}

template <int kDim, int kWarps, bool kOneStage>
void launch(const DenseAttention& args, cudaStream_t stream) {
  using T = Tile<kDim, kWarps>;
  static const cudaError_t allowed = cudaFuncSetAttribute(attend<kDim, kWarps, kOneStage>,
                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const dim3 grid(blocks_for(args.queries, T::kQueries), static_cast<unsigned>(args.batch * args.heads));
  launch_early(attend<kDim, kWarps, kOneStage>, grid, T::kThreads, Room<kDim, kWarps, kOneStage>(args).bytes(), stream,
               1, args);
  check_launch("attention");
}

template <int kDim>
void launch(const DenseAttention& args, cudaStream_t stream) {
  constexpr int kEnoughBlocks = 264;
  if (args.most_keys > 0 && args.most_keys <= kKeys)
    launch<kDim, 4, true>(args, stream);
  else if (static_cast<std::int64_t>(blocks_for(args.queries, 128)) * args.batch * args.heads >= kEnoughBlocks)
    launch<kDim, 8, false>(args, stream);
  else
    launch<kDim, 4, false>(args, stream);
}

}  // namespace

void dense_attention(const DenseAttention& args, cudaStream_t stream) {
  if (args.queries <= 0 || args.batch * args.heads <= 0) return;
  if (args.type == DType::f32) return dense_attention_f32(args, stream);
  if (args.batch * args.heads > 65535) throw Error(ErrorKind::usage, "attention in bf16 takes 65535 heads at most");
  with_head_dim(args.dim, [&](auto dim) { launch<dim>(args, stream); });
}

}  // namespace sparvar::cuda
