// Attention of tiles of queries to lists of keys on Hopper (sm_90a): the same work as attention_lists.cu, for heads of
// 64 to 128 channels. A warpgroup gathers rows of k and v into a ring of stages (16-byte copies that arrive at
// barriers, swizzled as wgmma reads them) and runs ahead into the next tile; one or two warpgroups of 64 queries each
// multiply them. Blocks stay and take one (batch, head, tile) after the other, tiles of a head side by side, so that
// its keys are read from the L2 cache. The division of work follows FlashAttention-3 (arXiv 2407.08608), section 3.
#include <algorithm>

#include "backend/cuda/kernels/attention_output.cuh"
#include "backend/cuda/kernels/hopper.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/tensor_map.cuh"
#include "backend/cuda/kernels/wgmma.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kMultiprocessorBytes = 227 * 1024;

/// kGroups: warpgroups that multiply, 64 queries each. Of one or two the queries stay in registers; three have too few
/// for that, and read them from shared memory. A product with its first matrix in registers needs 128 columns, so as
/// many keys, to run at full rate; two warpgroups have the room for them.
template <int kDim, int kGroups>
struct Shape {
  static constexpr int kBlocks = kGroups == 1 ? 2 : 1;  // on one multiprocessor
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kStageKeys = kGroups == 2 ? 128 : 64;
  static constexpr int kPanels = (kDim + 63) / 64;  // of 64 channels
  static constexpr int kQueryPanel = 64 * 128;
  static constexpr int kKeyPanel = kStageKeys * 128;
  static constexpr int kTileBytes = kPanels * kQueryPanel;  // queries of a warpgroup
  static constexpr int kQueryBytes = kGroups * kTileBytes;
  static constexpr int kValues = kPanels * kKeyPanel;  // of a stage: k, then v
  static constexpr int kStageBytes = 2 * kValues;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kRoom = kMultiprocessorBytes / kBlocks - kBarrierBytes - 1024;
  static constexpr int kStages = std::min(8, (kRoom - kQueryBytes) / kStageBytes);
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes + kBarrierBytes;
  static_assert(kStages >= 2);
};

#if __CUDA_ARCH__ >= 900

template <int kGroups>
constexpr bool kHolds = kGroups < 3;
constexpr int kGathererRegisters = 56;
template <int kGroups>
constexpr int kMultiplierRegisters = kGroups == 1   ? 200
                                     : kGroups == 2 ? 224
                                                    : 152;

struct Barriers {
  unsigned first;
  __device__ unsigned full(int stage) const { return first + 32 + 16 * stage; }
  __device__ unsigned empty(int stage) const { return first + 40 + 16 * stage; }
  __device__ unsigned queries_full() const { return first; }
  __device__ unsigned queries_empty() const { return first + 8; }
};

/// The pieces of work of this block, one after the other. Descriptions are read ahead: two pieces for the tile, which
/// says where the list is described, one for that.
struct Work {
  const ListAttention& a;
  int item, index = 0;
  TileRows tile, next_tile, tile_after;
  KeyRange range, next_range;

  __device__ explicit Work(const ListAttention& args) : a(args), item(static_cast<int>(blockIdx.x)) {
    next_tile = tile_of(item);
    tile_after = tile_of(item + step());
    next_range = range_of(item, next_tile);
    enter();
  }
  __device__ bool done() const { return item >= total(); }
  __device__ void advance() {
    item += step();
    enter();
  }

 private:
  __device__ int total() const { return a.batch * a.heads * a.tile_count; }
  __device__ int step() const { return static_cast<int>(gridDim.x); }
  __device__ TileRows tile_of(int i) const {
    if (i >= total()) return {};
    const int4 x = load_now(a.tiles + i % a.tile_count);
    return {.first_query = x.x, .queries = x.y, .list = x.z, .shift = x.w};
  }
  __device__ KeyRange range_of(int i, const TileRows& of) const {
    if (i >= total()) return {};
    const int4 x = load_now(a.ranges + (a.own_lists ? i / a.tile_count * a.list_tiles : 0) + of.list);
    return {.first = static_cast<std::int64_t>(static_cast<unsigned>(x.x)) | std::int64_t{x.y} << 32,
            .keys = x.z,
            .unused = 0};
  }
  __device__ void enter() {
    tile = next_tile;
    range = next_range;
    index = item / a.tile_count;
    next_tile = tile_after;
    next_range = range_of(item + step(), next_tile);
    tile_after = tile_of(item + 2 * step());
  }
  /// Not moved behind what follows.
  static __device__ int4 load_now(const void* from) {
    int4 x;
    asm volatile("ld.global.v4.s32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
  }
};

/// Eight entries of a list, from `at` on: read before they are needed, and not moved behind what follows.
struct Eight {
  int key[8];
  __device__ void load(const std::int32_t* list, int at, int count) {
    if (at >= count) return;
    const std::int32_t* const from = list + at;
    asm volatile("ld.global.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(key[0]), "=r"(key[1]), "=r"(key[2]), "=r"(key[3])
                 : "l"(from));
    asm volatile("ld.global.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(key[4]), "=r"(key[5]), "=r"(key[6]), "=r"(key[7])
                 : "l"(from + 4));
  }
};

/// Queries of a tile to shared memory, 16 bytes a time: `chunk` of eight rows from `row` on.
template <typename S, int kGroups>
__device__ inline void gather_queries(const ListAttention& a, const bf16* q, const TileRows& tile, unsigned to,
                                      int chunk, int row, int dim) {
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group)
#pragma unroll 4
    for (int i = 0; i < 8; ++i) {
      const int at = group * 64 + row + i;
      const bool there = at < tile.queries;
      const int query = there ? __ldg(a.rows + tile.first_query + at) : 0;
      copy_async(to + group * S::kTileBytes + i * 128 + (chunk % 8 ^ i) * 16, q + std::int64_t{query} * dim, there);
    }
}

template <int kDim, int kGroups>
__device__ inline void gather(const ListAttention& a, unsigned memory, Barriers barriers) {
  using S = Shape<kDim, kGroups>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int chunk = thread % 16;    // of 16 bytes of a row
  const int row = thread / 16 * 8;  // the first of eight
  const bool copies = chunk < kDim / 8;
  const unsigned query_place = chunk / 8 * S::kQueryPanel + row * 128;
  const unsigned key_place = S::kQueryBytes + chunk / 8 * S::kKeyPanel + row * 128;
  const auto swizzled = [&](int i) { return i * 128 + (chunk % 8 ^ i) * 16; };
  const std::int64_t values = static_cast<const bf16*>(a.v) - static_cast<const bf16*>(a.k);
  Ring<S::kStages> ring;
  unsigned query_turn = 0;
  for (Work work(a); !work.done(); work.advance()) {
    const TileRows& tile = work.tile;
    const bf16* const q = static_cast<const bf16*>(a.q) + work.index * std::int64_t{a.queries} * kDim + chunk * 8;
    const bf16* const k = static_cast<const bf16*>(a.k) + work.index * a.capacity * kDim + chunk * 8;
    const std::int32_t* const keys = a.keys + work.range.first;
    Eight ahead;
    const int count = work.range.keys;
    ahead.load(keys, row, count);
    wait_barrier(barriers.queries_empty(), query_turn ^ 1U);
    query_turn ^= 1U;
    if (copies) gather_queries<S, kGroups>(a, q, tile, memory + query_place, chunk, row, kDim);
    arrive_after_copies(barriers.queries_full());
    for (int first = 0; first < count; first += 64) {  // halves of a stage of 128
      const int half = first % S::kStageKeys;
      const Eight now = ahead;
      ahead.load(keys, first + 64 + row, count);
      if (half == 0) wait_barrier(barriers.empty(ring.stage), ring.turn ^ 1U);
      const unsigned to = memory + ring.stage * S::kStageBytes + half * 128 + key_place;
      const int left = count - first - row;
      if (copies)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bf16* const from = k + std::int64_t{i < left ? now.key[i] : 0} * kDim;
          copy_async(to + swizzled(i), from, i < left);
          copy_async(to + S::kValues + swizzled(i), from + values, i < left);
        }
      if (half + 64 < S::kStageKeys && first + 64 < count) continue;
      arrive_after_copies(barriers.full(ring.stage));
      ring.advance();
    }
  }
  commit_copies();
  wait_copies<0>();
}

/// The same for lists of whole boxes: one thread asks the copy engine for them.
template <int kDim, int kGroups>
__device__ inline void fetch_boxes(const ListAttention& a, const CUtensorMap* k, const CUtensorMap* v, unsigned memory,
                                   Barriers barriers) {
  using S = Shape<kDim, kGroups>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int chunk = thread % 16;
  const int row = thread / 16 * 8;
  const unsigned query_place = chunk / 8 * S::kQueryPanel + row * 128;
  Ring<S::kStages> ring;
  unsigned query_turn = 0;
  for (Work work(a); !work.done(); work.advance()) {
    const bf16* const q = static_cast<const bf16*>(a.q) + work.index * std::int64_t{a.queries} * kDim + chunk * 8;
    const std::int32_t* const keys = a.keys + work.range.first;
    const int count = work.range.keys;
    int next = thread == 0 && count > 0 ? keys[0] : 0;
    wait_barrier(barriers.queries_empty(), query_turn ^ 1U);
    query_turn ^= 1U;
    if (chunk < kDim / 8) gather_queries<S, kGroups>(a, q, work.tile, memory + query_place, chunk, row, kDim);
    arrive_after_copies(barriers.queries_full());
    if (thread == 0)
      for (int first = 0; first < count; first += S::kStageKeys) {
        const int key = next;
        if (first + S::kStageKeys < count) next = keys[first + S::kStageKeys];
        const unsigned full = barriers.full(ring.stage);
        const unsigned to = memory + S::kQueryBytes + ring.stage * S::kStageBytes;
        wait_barrier(barriers.empty(ring.stage), ring.turn ^ 1U);
        arrive_expecting(full, S::kStageBytes);
#pragma unroll
        for (int panel = 0; panel < S::kPanels; ++panel) {
          copy_box(to + panel * S::kKeyPanel, k, panel * 64, key, work.index, full);
          copy_box(to + S::kValues + panel * S::kKeyPanel, v, panel * 64, key, work.index, full);
        }
        ring.advance();
      }
    __syncwarp();  // lanes that wait for the next queries would keep the one that fetches from going on
  }
  commit_copies();
  wait_copies<0>();
}

template <typename S, int kSteps>
__device__ inline void begin_logits(float (&s)[S::kStageKeys / 8][4], const unsigned (&q)[kSteps][4], unsigned k) {
  begin_products();
#pragma unroll
  for (int d = 0; d < kSteps; ++d)
    multiply_held<S::kStageKeys, 0>(s, q[d], matrix_of(k + d / 4 * S::kKeyPanel + d % 4 * 32), d > 0 ? 1 : 0);
  commit_products();
}
template <typename S, int kSteps>
__device__ inline void begin_logits(float (&s)[S::kStageKeys / 8][4], unsigned q, unsigned k) {
  begin_products();
#pragma unroll
  for (int d = 0; d < kSteps; ++d)
    multiply<S::kStageKeys>(s, matrix_of(q + d / 4 * S::kQueryPanel + d % 4 * 32),
                            matrix_of(k + d / 4 * S::kKeyPanel + d % 4 * 32), d > 0 ? 1 : 0);
  commit_products();
}

/// A warp's rows of the queries, as the first matrix of products.
template <typename S, int kSteps>
__device__ inline void load_queries(unsigned (&q)[kSteps][4], unsigned tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int d = 0; d < kSteps; ++d)
    load_matrices(q[d], tile + row * 128 + d / 4 * S::kQueryPanel + (((d % 4 * 2 + lane / 16) ^ (row % 8)) * 16));
}

/// Of the first kProducts x 16 keys of the stage.
template <typename S, int kDim, int kProducts>
__device__ inline void begin_values(float (&out)[kDim / 8][4], const unsigned (&p)[S::kStageKeys / 16][4], unsigned v) {
  begin_products();
#pragma unroll
  for (int n = 0; n < kProducts; ++n)
    multiply_held<kDim, 1>(out, p[n], turned_matrix_of(v + n * 2048, S::kKeyPanel), 1);
  commit_products();
}

template <int kDim, int kGroups, bool kLogits>
__device__ inline void attend(const ListAttention& a, unsigned memory, Barriers barriers) {
  using S = Shape<kDim, kGroups>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Turns<kGroups> turns;
  Ring<S::kStages> ring;
  unsigned query_turn = 0;
  for (Work work(a); !work.done(); work.advance()) {
    const TileRows& tile = work.tile;
    const unsigned queries = memory + warp / 4 * S::kTileBytes;
    unsigned q[kHolds<kGroups> ? kDim / 16 : 1][4];
    wait_barrier(barriers.queries_full(), query_turn);
    query_turn ^= 1U;
    if constexpr (kHolds<kGroups>) {
      load_queries<S>(q, queries);
      __syncwarp();
      if (lane == 0) arrive(barriers.queries_empty());
    }

    Running<kDim> running;
    float s[S::kStageKeys / 8][4];
    unsigned p[S::kStageKeys / 16][4];
    float shrink[2];
    const float scale = a.scale * kLog2E;
    int logit_rows[2] = {-1, -1};
    if constexpr (kLogits)
      for (int half = 0; half < 2; ++half)
        if (const int row = warp * 16 + lane / 4 + 8 * half; row < tile.queries)
          logit_rows[half] = work.index * a.logits.queries + tile.first_query + row;
    const auto begin_stage = [&] {
      wait_barrier(barriers.full(ring.stage), ring.turn);
      show_to_products();
      turns.wait();
      const unsigned k = memory + S::kQueryBytes + ring.stage * S::kStageBytes;
      if constexpr (kHolds<kGroups>)
        begin_logits<S>(s, q, k);
      else
        begin_logits<S, kDim / 16>(s, queries, k);
    };
    const int count = work.range.keys;
    if (count > 0) {
      begin_stage();
      wait_products<0>();
      turns.pass();
      settle(s);
      if constexpr (kLogits) write_logits(a, s, logit_rows, work.range.first, count);
      weigh(running, s, scale, count, shrink);
      pack_weights(p, s);
    }
    // While the tensor cores add the values of one stage, the logits of the next become weights.
    for (int left = count; left > 0; left -= S::kStageKeys) {
      const int here = ring.stage;
      const unsigned v = memory + S::kQueryBytes + here * S::kStageBytes + S::kValues;
      ring.advance();
      if (left > S::kStageKeys) {
        begin_stage();
        begin_values<S, kDim, S::kStageKeys / 16>(running.out, p, v);
        wait_products<1>();
        turns.pass();
        settle(s);
        if constexpr (kLogits)
          write_logits(a, s, logit_rows, work.range.first + (count - left) + S::kStageKeys, left - S::kStageKeys);
        weigh(running, s, scale, left - S::kStageKeys, shrink);
        wait_products<0>();
        settle(running.out);
        settle(p);
        if (__any_sync(0xffffffffU, shrink[0] != 1.0F || shrink[1] != 1.0F)) rescale<kDim>(running, shrink);
        pack_weights(p, s);
      } else {
        if (left > 64)
          begin_values<S, kDim, S::kStageKeys / 16>(running.out, p, v);
        else  // the other half of the stage was not filled
          begin_values<S, kDim, 4>(running.out, p, v);
        wait_products<0>();
        settle(running.out);
      }
      if (lane == 0) arrive(barriers.empty(here));
    }
    if constexpr (!kHolds<kGroups>) {
      __syncwarp();
      if (lane == 0) arrive(barriers.queries_empty());
    }
    write_tile<kDim>(a, running, work.index, tile, warp * 16);
  }
}

#endif  // Hopper

/// kLogits: they are written too. With maps of k and v, lists are of whole boxes.
template <int kDim, int kGroups, bool kLogits, bool kBoxes>
__device__ inline void attend_lists(const ListAttention& a, const CUtensorMap* k, const CUtensorMap* v) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kDim, kGroups>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned memory = shared_address(shared);
  const Barriers barriers{memory + S::kQueryBytes + S::kStages * S::kStageBytes};
  if (threadIdx.x == 0) {
    init_barrier(barriers.queries_full(), 128);
    init_barrier(barriers.queries_empty(), 4 * kGroups);
    for (int i = 0; i < S::kStages; ++i) {
      init_barrier(barriers.full(i), kBoxes ? 1 : 128);
      init_barrier(barriers.empty(i), 4 * kGroups);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_earlier();
  if (threadIdx.x >= 128 * kGroups) {
    give_registers<kGathererRegisters>();
    if constexpr (kBoxes)
      fetch_boxes<kDim, kGroups>(a, k, v, memory, barriers);
    else
      gather<kDim, kGroups>(a, memory, barriers);
  } else {
    take_registers<kMultiplierRegisters<kGroups>>();
    attend<kDim, kGroups, kLogits>(a, memory, barriers);
  }
#endif
}

template <int kDim, int kGroups, bool kLogits>
__global__ void __launch_bounds__((Shape<kDim, kGroups>::kThreads), (Shape<kDim, kGroups>::kBlocks))
    attend_lists_hopper(const ListAttention a) {
  attend_lists<kDim, kGroups, kLogits, false>(a, nullptr, nullptr);
}

template <int kDim, int kGroups, bool kLogits>
__global__ void __launch_bounds__((Shape<kDim, kGroups>::kThreads), (Shape<kDim, kGroups>::kBlocks))
    attend_boxes_hopper(const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                        const ListAttention a) {
  attend_lists<kDim, kGroups, kLogits, true>(a, &k, &v);
}

template <int kDim, int kGroups>
unsigned blocks_of(const ListAttention& args) {
  const int items = args.batch * args.heads * args.tile_count;
  return static_cast<unsigned>(std::min(items, multiprocessors() * Shape<kDim, kGroups>::kBlocks));
}

template <int kDim, int kGroups, bool kLogits = false>
void launch(const ListAttention& args, cudaStream_t stream) {
  using S = Shape<kDim, kGroups>;
  static const cudaError_t allowed = cudaFuncSetAttribute(attend_lists_hopper<kDim, kGroups, kLogits>,
                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  launch_early(attend_lists_hopper<kDim, kGroups, kLogits>, blocks_of<kDim, kGroups>(args), S::kThreads,
               S::kSharedBytes, stream, 1, args);
  check_launch("attention of lists (Hopper)");
}

/// Boxes of 64 channels by the keys of a stage of k or v [B * H, capacity, D]; what lies behind the last key or channel
/// is zeros.
CUtensorMap map_of(const void* matrix, const ListAttention& a, int stage_keys) {
  CUtensorMap map{};
  const auto dim = static_cast<cuuint64_t>(a.dim);
  const cuuint64_t sizes[3] = {dim, static_cast<cuuint64_t>(a.keys_end), static_cast<cuuint64_t>(a.batch * a.heads)};
  const cuuint64_t strides[2] = {dim * sizeof(bf16), static_cast<cuuint64_t>(a.capacity) * dim * sizeof(bf16)};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(stage_keys), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(matrix), sizes, strides, box,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error(ErrorKind::system, "CUDA: a tensor map of keys was refused");
  return map;
}

template <int kDim, int kGroups, bool kLogits = false>
void launch_boxes(const ListAttention& args, cudaStream_t stream) {
  using S = Shape<kDim, kGroups>;
  static const cudaError_t allowed = cudaFuncSetAttribute(attend_boxes_hopper<kDim, kGroups, kLogits>,
                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  launch_early(attend_boxes_hopper<kDim, kGroups, kLogits>, blocks_of<kDim, kGroups>(args), S::kThreads,
               S::kSharedBytes, stream, 1, map_of(args.k, args, S::kStageKeys), map_of(args.v, args, S::kStageKeys),
               args);
  check_launch("attention of boxes (Hopper)");
}

/// Are lists whole stages of this many keys, and is there a copy engine to fetch them?
bool in_boxes(const ListAttention& args, int stage_keys) {
  return args.box_keys > 0 && args.box_keys % stage_keys == 0 && tensor_map_encoder() != nullptr;
}

}  // namespace

bool hopper_takes_heads_of(int dim) {
  return launches_overlap() && (dim == 64 || dim == 80 || dim == 96 || dim == 112 || dim == 128);
}

void list_attention_hopper(const ListAttention& args, cudaStream_t stream) {
  with_head_dim(args.dim, [&](auto dim) {
    if (args.logits.logits != nullptr)
      in_boxes(args, LogitRows::kStage) ? launch_boxes<dim, 1, true>(args, stream) : launch<dim, 1, true>(args, stream);
    else if (args.most_queries > 128)
      launch<dim, 3>(args, stream);
    else if (args.most_queries > 64)
      in_boxes(args, Shape<dim, 2>::kStageKeys) ? launch_boxes<dim, 2>(args, stream) : launch<dim, 2>(args, stream);
    else
      in_boxes(args, Shape<dim, 1>::kStageKeys) ? launch_boxes<dim, 1>(args, stream) : launch<dim, 1>(args, stream);
  });
}

}  // namespace sparvar::cuda
