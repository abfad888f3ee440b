// Column sums on Hopper: 192 keys to a block, 64 to each of three warpgroups, whose rows stay in registers; queries
// pass by in stages that a fourth warpgroup gathers. While the tensor cores make the logits of one stage, those of the
// stage before become weights.
#include <algorithm>

#include "backend/cuda/kernels/column_sums.cuh"
#include "backend/cuda/kernels/hopper.cuh"
#include "backend/cuda/kernels/wgmma.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kGroups = 3;
constexpr int kBlockKeys = 64 * kGroups;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kPair = 2 * kKeys;     // queries
constexpr int kKeyPanel = 64 * 128;  // of 64 channels
constexpr int kQueryPanel = kPair * 128;
constexpr int kLesseningBytes = kPair * 4;

template <int kDim>
struct Shape {
  static constexpr int kPanels = (kDim + 63) / 64;
  static constexpr int kTileBytes = kPanels * kKeyPanel;  // keys of a warpgroup
  static constexpr int kKeyBytes = kGroups * kTileBytes;
  static constexpr int kStages = 4;  // pairs on their way
  static constexpr int kStageBytes = kPanels * kQueryPanel;
  static constexpr int kLessening = kKeyBytes + kStages * kStageBytes;  // where it begins
  static constexpr int kBarriers = kLessening + kStages * kLesseningBytes;
  static constexpr int kSharedBytes = kBarriers + 16 * (kStages + 1);
  static_assert(kSharedBytes <= 226 * 1024);
};

#if __CUDA_ARCH__ >= 900

constexpr int kGathererRegisters = 56;
constexpr int kMultiplierRegisters = 152;

__device__ inline void copy_word(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

template <int kDim>
__device__ inline void gather(const ColumnSums& a, unsigned memory) {
  using S = Shape<kDim>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int chunk = thread % 16;
  const int row = thread / 16 * 8;  // the first of eight
  const bool copies = chunk < kDim / 8;
  const unsigned key_place = chunk / 8 * kKeyPanel + row * 128;
  const unsigned query_place = S::kKeyBytes + chunk / 8 * kQueryPanel + row * 128;
  const auto swizzled = [&](int i) { return i * 128 + (chunk % 8 ^ i) * 16; };
  const unsigned keys_full = memory + S::kBarriers + 16 * S::kStages;
  const int tiles = (a.keys + kBlockKeys - 1) / kBlockKeys;
  const int total = a.batch * a.heads * tiles;
  Ring<S::kStages> ring;
  unsigned key_turn = 0;
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    const int index = item / tiles;
    const int first_key = item % tiles * kBlockKeys;
    const bf16* const q = static_cast<const bf16*>(a.q) + index * std::int64_t{a.queries} * kDim + chunk * 8;
    const bf16* const k = static_cast<const bf16*>(a.k) + index * a.capacity * kDim + chunk * 8;
    wait_barrier(keys_full + 8, key_turn ^ 1U);
    key_turn ^= 1U;
    if (copies)
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int key = first_key + group * 64 + row + i;
          const bool there = key < a.keys;
          copy_async(memory + group * S::kTileBytes + key_place + swizzled(i), k + std::int64_t{there ? key : 0} * kDim,
                     there);
        }
    arrive_after_copies(keys_full);
    const float* const lessening = a.lessening + std::int64_t{index} * a.stage_count * kKeys;
    for (int stage = 0; stage < a.stage_count; ++stage) {
      const int half = stage % 2;
      const int4 low = __ldg(reinterpret_cast<const int4*>(a.rows + stage * kKeys + row));
      const int4 high = __ldg(reinterpret_cast<const int4*>(a.rows + stage * kKeys + row) + 1);
      const int rows[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const unsigned barrier = memory + S::kBarriers + 16 * ring.stage;
      if (half == 0) wait_barrier(barrier + 8, ring.turn ^ 1U);
      const unsigned to = memory + ring.stage * S::kStageBytes + half * kKeys * 128 + query_place;
      if (copies)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          copy_async(to + swizzled(i), q + std::int64_t{max(rows[i], 0)} * kDim, rows[i] >= 0);
      if (thread < kKeys)
        copy_word(memory + S::kLessening + ring.stage * kLesseningBytes + (half * kKeys + thread) * 4,
                  lessening + stage * kKeys + thread);
      if (half == 0) continue;
      arrive_after_copies(barrier);
      ring.advance();
    }
  }
  commit_copies();
  wait_copies<0>();
}

template <int kDim>
__device__ inline void sum(const ColumnSums& a, unsigned memory, const unsigned char* shared) {
  using S = Shape<kDim>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned keys_full = memory + S::kBarriers + 16 * S::kStages;
  const int tiles = (a.keys + kBlockKeys - 1) / kBlockKeys;
  const int total = a.batch * a.heads * tiles;
  const Turns<kGroups> turns;
  Ring<S::kStages> ring;
  unsigned key_turn = 0;
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    const int index = item / tiles;
    const int key = item % tiles * kBlockKeys + warp * 16;
    wait_barrier(keys_full, key_turn);
    key_turn ^= 1U;
    unsigned k[kDim / 16][4];
    const int row = warp % 4 * 16 + lane % 16;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d)
      load_matrices(k[d], memory + warp / 4 * S::kTileBytes + row * 128 + d / 4 * kKeyPanel +
                              (((d % 4 * 2 + lane / 16) ^ (row % 8)) * 16));
    __syncwarp();
    if (lane == 0) arrive(keys_full + 8);

    GroupSums sums;
    for (int stage = 0; stage < a.stage_count; stage += 2) {
      float logits[2][kKeys / 8][4];
      const unsigned barrier = memory + S::kBarriers + 16 * ring.stage;
      wait_barrier(barrier, ring.turn);
      show_to_products();
      turns.wait();
      const unsigned q = memory + S::kKeyBytes + ring.stage * S::kStageBytes;
      auto& all = reinterpret_cast<float(&)[kPair / 8][4]>(logits);
      begin_products();
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d)
        multiply_held<kPair, 0>(all, k[d], matrix_of(q + d / 4 * kQueryPanel + d % 4 * 32), d > 0 ? 1 : 0);
      commit_products();
      const int4 first = __ldg(reinterpret_cast<const int4*>(a.stages + stage));
      const int4 second = __ldg(reinterpret_cast<const int4*>(a.stages + stage) + 1);
      wait_products<0>();
      turns.pass();
      settle(all);
      const auto* const lessening =
          reinterpret_cast<const float*>(shared + S::kLessening + ring.stage * kLesseningBytes);
      sum_stage(a, sums, logits[0], lessening, {first.x, first.y, first.z, 0}, a.group_of + stage * kKeys, index, key);
      sum_stage(a, sums, logits[1], lessening + kKeys, {second.x, second.y, second.z, 0},
                a.group_of + (stage + 1) * kKeys, index, key);
      __syncwarp();
      if (lane == 0) arrive(barrier + 8);
      ring.advance();
    }
  }
}

#endif  // Hopper

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) sum_columns_hopper(const ColumnSums a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned memory = shared_address(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i <= S::kStages; ++i) {  // the last pair is that of the keys
      init_barrier(memory + S::kBarriers + 16 * i, 128);
      init_barrier(memory + S::kBarriers + 16 * i + 8, 4 * kGroups);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_earlier();
  if (threadIdx.x >= 128 * kGroups) {
    give_registers<kGathererRegisters>();
    gather<kDim>(a, memory);
  } else {
    take_registers<kMultiplierRegisters>();
    sum<kDim>(a, memory, shared);
  }
#endif
}

template <int kDim>
void launch(const ColumnSums& args, cudaStream_t stream) {
  using S = Shape<kDim>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(sum_columns_hopper<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const auto items = static_cast<unsigned>(args.batch * args.heads) * blocks_for(args.keys, kBlockKeys);
  const unsigned blocks = std::min(items, static_cast<unsigned>(multiprocessors()));
  launch_early(sum_columns_hopper<kDim>, blocks, kThreads, S::kSharedBytes, stream, 1, args);
  check_launch("column sums (Hopper)");
}

}  // namespace

void column_sums_hopper(const ColumnSums& args, cudaStream_t stream) {
  with_head_dim(args.dim, [&](auto dim) { launch<dim>(args, stream); });
}

}  // namespace sparvar::cuda
