// Column sums on Hopper: 256 keys to a block, twice 64 to each of two warpgroups; queries pass by in pairs of stages,
// 128 columns to a product, which a third warpgroup gathers, and the keys of the next piece of work. While the tensor
// cores make the logits of one half of a warpgroup's keys, those of the other become weights.
#include <algorithm>

#include "backend/cuda/kernels/column_sums.cuh"
#include "backend/cuda/kernels/hopper.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kGroups = 2;
constexpr int kHalves = 2;  // of a warpgroup's keys
constexpr int kTiles = kGroups * kHalves;
constexpr int kBlockKeys = 64 * kTiles;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kPair = 2 * kKeys;     // queries
constexpr int kKeyPanel = 64 * 128;  // of 64 channels
constexpr int kQueryPanel = kPair * 128;
constexpr int kLesseningBytes = kPair * 4;

template <int kDim>
struct Shape {
  static constexpr int kPanels = (kDim + 63) / 64;
  static constexpr int kTileBytes = kPanels * kKeyPanel;  // 64 keys
  static constexpr int kKeyBytes = kTiles * kTileBytes;
  static constexpr int kStages = 3;  // pairs on their way
  static constexpr int kStageBytes = kPanels * kQueryPanel;
  static constexpr int kLessening = 2 * kKeyBytes + kStages * kStageBytes;  // where it begins
  static constexpr int kBarriers = kLessening + kStages * kLesseningBytes;
  static constexpr int kSharedBytes = kBarriers + 16 * (kStages + 2);
  static_assert(kSharedBytes <= 226 * 1024);
};

#if __CUDA_ARCH__ >= 900

constexpr int kGathererRegisters = 56;
constexpr int kMultiplierRegisters = 224;

struct Ring {
  int stage = 0;
  unsigned turn = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, turn ^= 1U;
  }
};

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
  const unsigned query_place = 2 * S::kKeyBytes + chunk / 8 * kQueryPanel + row * 128;
  const auto swizzled = [&](int i) { return i * 128 + (chunk % 8 ^ i) * 16; };
  const unsigned key_barriers = memory + S::kBarriers + 16 * S::kStages;  // of two buffers
  const int tiles = (a.keys + kBlockKeys - 1) / kBlockKeys;
  const int total = a.batch * a.heads * tiles;
  Ring ring, keys;
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    const int index = item / tiles;
    const int first_key = item % tiles * kBlockKeys;
    const bf16* const q = static_cast<const bf16*>(a.q) + index * std::int64_t{a.queries} * kDim + chunk * 8;
    const bf16* const k = static_cast<const bf16*>(a.k) + index * a.capacity * kDim + chunk * 8;
    const unsigned key_barrier = key_barriers + 16 * keys.stage;
    wait_barrier(key_barrier + 8, keys.turn ^ 1U);
    if (copies)
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int key = first_key + tile * 64 + row + i;
          const bool there = key < a.keys;
          copy_async(memory + keys.stage * S::kKeyBytes + tile * S::kTileBytes + key_place + swizzled(i),
                     k + std::int64_t{there ? key : 0} * kDim, there);
        }
    arrive_after_copies(key_barrier);
    keys.advance(2);
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
      ring.advance(S::kStages);
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
  const unsigned key_barriers = memory + S::kBarriers + 16 * S::kStages;  // of two buffers
  const int tiles = (a.keys + kBlockKeys - 1) / kBlockKeys;
  const int total = a.batch * a.heads * tiles;
  const Turns<kGroups> turns;
  Ring ring, keys;
  for (int item = static_cast<int>(blockIdx.x); item < total; item += static_cast<int>(gridDim.x)) {
    const int index = item / tiles;
    const int key = item % tiles * kBlockKeys + warp / 4 * 64 * kHalves + warp % 4 * 16;  // of the first half
    const unsigned key_barrier = key_barriers + 16 * keys.stage;
    const unsigned k = memory + keys.stage * S::kKeyBytes + warp / 4 * kHalves * S::kTileBytes;
    wait_barrier(key_barrier, keys.turn);
    keys.advance(2);

    GroupSums sums[kHalves];
    float logits[kHalves][2][kKeys / 8][4];
    const auto begin = [&](int half) {
      const unsigned q = memory + 2 * S::kKeyBytes + ring.stage * S::kStageBytes;
      begin_products();
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d)
        multiply<kPair>(reinterpret_cast<float(&)[kPair / 2]>(logits[half]),
                        matrix_of(k + half * S::kTileBytes + d / 4 * kKeyPanel + d % 4 * 32),
                        matrix_of(q + d / 4 * kQueryPanel + d % 4 * 32), d > 0 ? 1 : 0);
      commit_products();
    };
    const auto finish = [&](int half, int stage) {
      const int4 first = __ldg(reinterpret_cast<const int4*>(a.stages + stage));
      const int4 second = __ldg(reinterpret_cast<const int4*>(a.stages + stage) + 1);
      settle(reinterpret_cast<float(&)[kPair / 8][4]>(logits[half]));
      const auto* const lessening =
          reinterpret_cast<const float*>(shared + S::kLessening + ring.stage * kLesseningBytes);
      sum_stage(a, sums[half], logits[half][0], lessening, {first.x, first.y, first.z, 0}, a.group_of + stage * kKeys,
                index, key + 64 * half);
      sum_stage(a, sums[half], logits[half][1], lessening + kKeys, {second.x, second.y, second.z, 0},
                a.group_of + (stage + 1) * kKeys, index, key + 64 * half);
    };
    for (int stage = 0; stage < a.stage_count; stage += 2) {
      wait_barrier(memory + S::kBarriers + 16 * ring.stage, ring.turn);
      show_to_products();
      turns.wait();
      begin(0);
      begin(1);
      turns.pass();
      wait_products<1>();
      finish(0, stage);
      wait_products<0>();
      finish(1, stage);
      __syncwarp();
      if (lane == 0) arrive(memory + S::kBarriers + 16 * ring.stage + 8);
      ring.advance(S::kStages);
    }
    if (lane == 0) arrive(key_barrier + 8);
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
    for (int i = 0; i < S::kStages + 2; ++i) {  // the last two pairs are those of the keys
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
