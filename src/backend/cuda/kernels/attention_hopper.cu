// Attention of tiles of queries to lists of keys on Hopper (sm_90a): the same work as attention_lists.cu, for heads of
// 64 to 128 channels. A warpgroup gathers rows of k and v into a ring of stages (16-byte copies that arrive at
// barriers, swizzled as wgmma reads them) and runs ahead into the next tile; one to three warpgroups of 64 queries each
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

/// kGroups: warpgroups that multiply, 64 queries each, which stay in shared memory: as the first matrix of products
/// they would take registers. Two warpgroups have the room for stages of 128 keys, over which what a stage costs
/// besides its keys is spread.
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
  static constexpr int kBarrierBytes = 384;  // and descriptions
  static constexpr int kRoom = kMultiprocessorBytes / kBlocks - kBarrierBytes - 1024;
  static constexpr int kStages = std::min(8, (kRoom - kQueryBytes) / kStageBytes);
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes + kBarrierBytes;
  static_assert(kStages >= 2 && kStages <= 8);
};

#if __CUDA_ARCH__ >= 900

constexpr int kGathererRegisters = 56;
template <int kGroups>
constexpr int kMultiplierRegisters = kGroups == 1   ? 200
                                     : kGroups == 2 ? 224
                                                    : 152;

/// What was gathered is shown to the products (a proxy fence) by the gatherer, which waits for its copies, or by those
/// that multiply. The latter have to wait for it at every stage, but more copies are on their way: two blocks on a
/// multiprocessor need them.
template <int kGroups>
constexpr bool kGathererShows = kGroups > 1;

struct Barriers {
  unsigned first;
  __device__ unsigned keys_full(int stage) const { return first + 32 + 32 * stage; }
  __device__ unsigned keys_empty(int stage) const { return keys_full(stage) + 8; }
  __device__ unsigned values_full(int stage) const { return keys_full(stage) + 16; }
  __device__ unsigned values_empty(int stage) const { return keys_full(stage) + 24; }
  __device__ unsigned queries_full() const { return first; }
  __device__ unsigned queries_empty() const { return first + 8; }
  /// Where the gatherer leaves the TileRows and the KeyRange of every other piece of work.
  __device__ unsigned description(unsigned turn) const { return first + 320 + 32 * turn; }
};

/// A piece of work: which (batch, head), and which of the tiles. Whole tiles of all heads come before the others, which
/// take less time and fill what the last round of whole ones leaves.
struct Place {
  int index, tile;
  __device__ Place(const ListAttention& a, int item) {
    const int whole = a.batch * a.heads * a.whole_tiles;
    const bool others = item >= whole;
    const int of_head = max(others ? a.tile_count - a.whole_tiles : a.whole_tiles, 1);  // 0: behind the last piece
    const int at = others ? item - whole : item;
    index = at / of_head;
    tile = at % of_head + (others ? a.whole_tiles : 0);
  }
};

/// The pieces of work of this block, one after the other, as the gatherer sees them. Descriptions are read ahead: two
/// pieces for the tile, which says where the list is described, one for that.
struct Work {
  const ListAttention& a;
  int item;
  Place place, next_place, place_after;
  TileRows tile, next_tile, tile_after;
  KeyRange range, next_range;

  __device__ explicit Work(const ListAttention& args)
      : a(args),
        item(static_cast<int>(blockIdx.x)),
        place(a, item),
        next_place(place),
        place_after(a, item + step()),
        next_tile(tile_of(item, next_place)),
        tile_after(tile_of(item + step(), place_after)),
        next_range(range_of(item, next_place, next_tile)) {
    enter();
  }
  __device__ bool done() const { return item >= total(); }
  __device__ const TileRows* tile_at() const { return a.tiles + place.tile; }
  __device__ const KeyRange* range_at() const { return range_at(place, tile); }
  __device__ void advance() {
    item += step();
    enter();
  }

 private:
  __device__ int total() const { return a.batch * a.heads * a.tile_count; }
  __device__ int step() const { return static_cast<int>(gridDim.x); }
  __device__ const KeyRange* range_at(const Place& at, const TileRows& of) const {
    return a.ranges + (a.own_lists ? at.index * a.list_tiles : 0) + of.list;
  }
  __device__ TileRows tile_of(int i, const Place& at) const {
    if (i >= total()) return {};
    const int4 x = load_now(a.tiles + at.tile);
    return {.first_query = x.x, .queries = x.y, .list = x.z, .shift = x.w};
  }
  __device__ KeyRange range_of(int i, const Place& at, const TileRows& of) const {
    if (i >= total()) return {};
    const int4 x = load_now(range_at(at, of));
    return {.first = static_cast<std::int64_t>(static_cast<unsigned>(x.x)) | std::int64_t{x.y} << 32,
            .keys = x.z,
            .unused = 0};
  }
  __device__ void enter() {
    place = next_place;
    tile = next_tile;
    range = next_range;
    next_place = place_after;
    next_tile = tile_after;
    next_range = range_of(item + step(), next_place, next_tile);
    place_after = Place(a, item + 2 * step());
    tile_after = tile_of(item + 2 * step(), place_after);
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

/// Queries of tiles to shared memory, 16 bytes a time: a thread copies a chunk of eight rows of every 64. They are
/// asked for behind the first keys, as they are free only when a tile's last logits are made.
template <int kDim, int kGroups>
struct Queries {
  using S = Shape<kDim, kGroups>;
  Barriers barriers;
  int chunk, row;
  unsigned to, turn = 0;

  __device__ Queries(unsigned memory, Barriers b)
      : barriers(b),
        chunk(static_cast<int>(threadIdx.x) % 16),
        row(static_cast<int>(threadIdx.x) % 128 / 16 * 8),
        to(memory + chunk / 8 * S::kQueryPanel + row * 128) {}

  __device__ void fetch(const ListAttention& a, const Work& work, bool copies) {
    const bf16* const q = static_cast<const bf16*>(a.q) + work.place.index * std::int64_t{a.queries} * kDim + chunk * 8;
    wait_barrier(barriers.queries_empty(), turn ^ 1U);
    if (threadIdx.x % 128 == 0) {
      copy_async(barriers.description(turn), work.tile_at(), true);
      copy_async(barriers.description(turn) + 16, work.range_at(), true);
    }
    turn ^= 1U;
    if (copies)
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group)
#pragma unroll 4
        for (int i = 0; i < 8; ++i) {
          const int at = group * 64 + row + i;
          const bool there = at < work.tile.queries;
          const int query = there ? __ldg(a.rows + work.tile.first_query + at) : 0;
          copy_async(to + group * S::kTileBytes + i * 128 + (chunk % 8 ^ i) * 16, q + std::int64_t{query} * kDim,
                     there);
        }
    arrive_after_copies(barriers.queries_full());
  }
};

template <int kDim, int kGroups>
__device__ inline void gather(const ListAttention& a, unsigned memory, Barriers barriers) {
  using S = Shape<kDim, kGroups>;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int chunk = thread % 16;    // of 16 bytes of a row
  const int row = thread / 16 * 8;  // the first of eight
  const bool copies = chunk < kDim / 8;
  const unsigned key_place = S::kQueryBytes + chunk / 8 * S::kKeyPanel + row * 128;
  const auto swizzled = [&](int i) { return i * 128 + (chunk % 8 ^ i) * 16; };
  const std::int64_t values = static_cast<const bf16*>(a.v) - static_cast<const bf16*>(a.k);
  Ring<S::kStages> ring;
  Queries<kDim, kGroups> queries(memory, barriers);
  Work work(a);
  wait_for_earlier();
  for (; !work.done(); work.advance()) {
    const bf16* const k = static_cast<const bf16*>(a.k) + work.place.index * a.capacity * kDim + chunk * 8;
    const std::int32_t* const keys = a.keys + work.range.first;
    Eight ahead;
    const int count = work.range.keys;
    ahead.load(keys, row, count);
    if (count == 0) queries.fetch(a, work, copies);
    for (int first = 0; first < count; first += 64) {  // halves of a stage of 128
      const int half = first % S::kStageKeys;
      const Eight now = ahead;
      ahead.load(keys, first + 64 + row, count);
      if (half == 0) wait_barrier(barriers.values_empty(ring.stage), ring.turn ^ 1U);  // its keys were free before
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
      if constexpr (kGathererShows<kGroups>) {
        commit_copies();
        wait_copies<0>();
        show_to_products();
        arrive(barriers.keys_full(ring.stage));  // and values
      } else {
        arrive_after_copies(barriers.keys_full(ring.stage));
      }
      ring.advance();
      if (first < S::kStageKeys) queries.fetch(a, work, copies);
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
  const bool copies = thread % 16 < kDim / 8;
  Ring<S::kStages> ring;
  Queries<kDim, kGroups> queries(memory, barriers);
  Work work(a);
  wait_for_earlier();
  for (; !work.done(); work.advance()) {
    const std::int32_t* const keys = a.keys + work.range.first;
    const int count = work.range.keys;
    int next = thread == 0 && count > 0 ? keys[0] : 0;
    const auto fetch = [&](const CUtensorMap* map, unsigned place, int key, unsigned full, unsigned empty) {
      wait_barrier(empty, ring.turn ^ 1U);
      arrive_expecting(full, S::kValues);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel)
        copy_box(place + panel * S::kKeyPanel, map, panel * 64, key, work.place.index, full);
    };
    const auto fetch_stage = [&](int first) {
      const int key = next;
      if (first + S::kStageKeys < count) next = keys[first + S::kStageKeys];
      const unsigned to = memory + S::kQueryBytes + ring.stage * S::kStageBytes;
      fetch(k, to, key, barriers.keys_full(ring.stage), barriers.keys_empty(ring.stage));
      fetch(v, to + S::kValues, key, barriers.values_full(ring.stage), barriers.values_empty(ring.stage));
      ring.advance();
    };
    if (thread == 0 && count > 0) fetch_stage(0);
    __syncwarp();
    queries.fetch(a, work, copies);
    if (thread == 0)
      for (int first = S::kStageKeys; first < count; first += S::kStageKeys) fetch_stage(first);
    __syncwarp();  // lanes that wait for the next queries would keep the one that fetches from going on
  }
  commit_copies();
  wait_copies<0>();
}

template <typename S, int kSteps>
__device__ inline void begin_logits(float (&s)[S::kStageKeys / 8][4], unsigned q, unsigned k) {
  begin_products();
#pragma unroll
  for (int d = 0; d < kSteps; ++d)
    multiply<S::kStageKeys>(s, further(matrix_of(q), d / 4 * S::kQueryPanel + d % 4 * 32),
                            further(matrix_of(k), d / 4 * S::kKeyPanel + d % 4 * 32), d > 0 ? 1 : 0);
  commit_products();
}

/// Of the first kProducts x 16 keys of the stage.
template <typename S, int kDim, int kProducts>
__device__ inline void begin_values(float (&out)[kDim / 8][4], const unsigned (&p)[S::kStageKeys / 16][4], unsigned v) {
  begin_products();
#pragma unroll
  for (int n = 0; n < kProducts; ++n)
    multiply_held<kDim, 1>(out, p[n], further(turned_matrix_of(v, S::kKeyPanel), n * 2048), 1);
  commit_products();
}

/// What a warpgroup has of a tile. kBoxes: the copy engine fetches keys and values, each with a barrier of its own.
template <int kDim, int kGroups, bool kLogits, bool kBoxes>
struct Attending {
  using S = Shape<kDim, kGroups>;
  using Logits = float[S::kStageKeys / 8][4];
  const ListAttention& a;
  const Barriers barriers;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned memory, queries;
  int item = static_cast<int>(blockIdx.x);
  int index = 0;      // of the (batch, head)
  int count = 0;      // of the keys of its list
  bool idle = false;  // none of the tile's queries is this warpgroup's
  unsigned turn = 0;  // of items
  Ring<S::kStages> keys, values;
  Running<kDim> running;
  unsigned p[S::kStageKeys / 16][4];
  float shrink[2];
  int logit_rows[2] = {-1, -1};
  std::int64_t first_place = 0;  // of logits

  __device__ Attending(const ListAttention& args, unsigned all, Barriers b)
      : a(args), barriers(b), memory(all + S::kQueryBytes), queries(all + warpgroup() * S::kTileBytes) {}

  __device__ bool done() const { return item >= a.batch * a.heads * a.tile_count; }
  __device__ void start() {
    wait_barrier(barriers.queries_full(), turn);
    show_to_products();
    const KeyRange range = described<KeyRange>(16);
    const TileRows tile = described<TileRows>(0);
    count = range.keys;
    index = Place(a, item).index;
    idle = kGroups > 1 && tile.queries <= static_cast<int>(warpgroup()) * 64;
    running = {};
    if constexpr (kLogits) {
      first_place = range.first;
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + 8 * half;
        logit_rows[half] = row < tile.queries ? index * a.logits.queries + tile.first_query + row : -1;
      }
    }
    if (count == 0 && lane == 0) arrive(barriers.queries_empty());
  }
  __device__ void end() {
    if (!idle) write_tile<kDim>(a, running, index, described<TileRows>(0), warp * 16);
    turn ^= 1U;
    item += static_cast<int>(gridDim.x);
  }
  __device__ void wait_for_keys() const {
    wait_barrier(barriers.keys_full(keys.stage), keys.turn);
    if constexpr (!kBoxes && !kGathererShows<kGroups>) show_to_products();  // gathered values too
  }
  __device__ void begin_logits(Logits& s) {
    sparvar::cuda::begin_logits<S, kDim / 16>(s, queries, memory + keys.stage * S::kStageBytes);
  }
  /// A stage goes by whose keys are of no use to this warpgroup.
  __device__ void let_pass(bool last) {
    wait_for_keys();
    if constexpr (kBoxes) wait_barrier(barriers.values_full(values.stage), values.turn);
    if (lane == 0) {
      arrive(barriers.keys_empty(keys.stage));
      arrive(barriers.values_empty(values.stage));
      if (last) arrive(barriers.queries_empty());
    }
    keys.advance();
    values.advance();
  }
  /// After the products have been waited for.
  __device__ void end_logits(Logits& s, bool last) {
    settle(s);
    if (lane == 0) {
      arrive(barriers.keys_empty(keys.stage));
      if (last) arrive(barriers.queries_empty());
    }
    keys.advance();
  }
  /// kLast: a stage that may not be full. Without branches: the compiler waits for all products before one.
  template <bool kLast>
  __device__ void weigh(Logits& s, int left) {
    if constexpr (kLogits) write_logits(a, s, logit_rows, first_place + (count - left), left);
    if constexpr (kLast) drop_missing(s, left);
    sparvar::cuda::weigh(running, s, a.scale * kLog2E, shrink);
    hold(running.sum[0] + running.sum[1]);
  }
  __device__ void rescale_and_pack(const Logits& s) {
    if (__any_sync(0xffffffffU, shrink[0] != 1.0F || shrink[1] != 1.0F)) rescale<kDim>(running, shrink);
    pack_weights(p, s);
  }
  __device__ void begin_values(int left) {
    if constexpr (kBoxes) wait_barrier(barriers.values_full(values.stage), values.turn);
    const unsigned v = memory + values.stage * S::kStageBytes + S::kValues;
    if (left > 64)
      sparvar::cuda::begin_values<S, kDim, S::kStageKeys / 16>(running.out, p, v);
    else  // the other half of a stage was not filled
      sparvar::cuda::begin_values<S, kDim, 4>(running.out, p, v);
  }
  __device__ void end_values() {
    settle(running.out);
    settle(p);
    if (lane == 0) arrive(barriers.values_empty(values.stage));
    values.advance();
  }

 private:
  /// Weights are made here, and not behind a wait for products that run meanwhile: the compiler keeps a write to memory
  /// in its place, also this one, which never happens.
  __device__ void hold(float sum) const {
    asm volatile(
        "{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never st.shared.f32 [%1], %0;\n}" ::"f"(sum),
        "r"(barriers.first)
        : "memory");
  }
  template <typename T>
  __device__ T described(unsigned offset) const {
    static_assert(sizeof(T) == sizeof(int4));
    int4 x;
    asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(barriers.description(turn) + offset));
    T out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
};

/// The tensor cores add the values of one stage while the logits of the next become weights.
template <int kDim, int kGroups, bool kLogits, bool kBoxes>
__device__ inline void attend(const ListAttention& args, unsigned memory, Barriers barriers) {
  using S = Shape<kDim, kGroups>;
  Attending<kDim, kGroups, kLogits, kBoxes> a(args, memory, barriers);
  for (; !a.done(); a.end()) {
    a.start();
    float s[S::kStageKeys / 8][4];
    int left = a.count;
    for (; a.idle && left > 0; left -= S::kStageKeys) a.let_pass(left <= S::kStageKeys);
    const auto step = [&](auto last) {
      a.wait_for_keys();
      a.begin_logits(s);
      a.begin_values(S::kStageKeys);
      wait_products<1>();
      left -= S::kStageKeys;
      a.end_logits(s, last);
      a.template weigh<last>(s, left);
      wait_products<0>();
      a.end_values();
      a.rescale_and_pack(s);
    };
    if (left > 0) {
      a.wait_for_keys();
      a.begin_logits(s);
      wait_products<0>();
      a.end_logits(s, left <= S::kStageKeys);
      a.template weigh<true>(s, left);
      pack_weights(a.p, s);
      while (left > 2 * S::kStageKeys) step(std::false_type{});
      if (left > S::kStageKeys) step(std::true_type{});
      a.begin_values(left);
      wait_products<0>();
      a.end_values();
    }
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
  if (kBoxes && threadIdx.x == 128 * kGroups) fetch_map(k), fetch_map(v);
  if (threadIdx.x == 0) {
    init_barrier(barriers.queries_full(), 128);
    init_barrier(barriers.queries_empty(), 4 * kGroups);
    for (int i = 0; i < S::kStages; ++i) {
      for (const unsigned full : {barriers.keys_full(i), barriers.values_full(i)}) {
        init_barrier(full, kBoxes ? 1 : 128);
        init_barrier(full + 8, 4 * kGroups);
      }
    }
    publish_barriers();
  }
  __syncthreads();
  if (!a.settled || threadIdx.x < 128 * kGroups) wait_for_earlier();
  if (threadIdx.x >= 128 * kGroups) {
    give_registers<kGathererRegisters>();
    if constexpr (kBoxes)
      fetch_boxes<kDim, kGroups>(a, k, v, memory, barriers);
    else
      gather<kDim, kGroups>(a, memory, barriers);
  } else {
    take_registers<kMultiplierRegisters<kGroups>>();
    attend<kDim, kGroups, kLogits, kBoxes>(a, memory, barriers);
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
      in_boxes(args, Shape<dim, 3>::kStageKeys) ? launch_boxes<dim, 3>(args, stream) : launch<dim, 3>(args, stream);
    else if (args.most_queries > 64)
      in_boxes(args, Shape<dim, 2>::kStageKeys) ? launch_boxes<dim, 2>(args, stream) : launch<dim, 2>(args, stream);
    else
      in_boxes(args, Shape<dim, 1>::kStageKeys) ? launch_boxes<dim, 1>(args, stream) : launch<dim, 1>(args, stream);
  });
}

}  // namespace sparvar::cuda
