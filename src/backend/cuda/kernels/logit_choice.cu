// The keys with the largest logits of a query, of logits that its attention wrote. A warp to a query: it reads the
// largest of every eight logits, finds a bound that as many of them reach as keys are wanted, and so reads only the
// eights in which a wanted key can lie. Exact: of equal logits the lower key, NaN is least.
#include <climits>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kMostCandidates = 768;
constexpr unsigned kAll = 0xffffffffU;

struct Scratch {
  std::uint16_t groups[ChooseOfLogits::kMostKeys / LogitRows::kGroup];
  std::uint16_t keys[kMostCandidates];
  unsigned ranks[kMostCandidates];
};
static_assert(ChooseOfLogits::kMostKeys < 65536 && ChooseOfLogits::kMostChosen <= kMostCandidates);
static_assert(kWarps * sizeof(Scratch) <= 48 * 1024);

/// The key at a place of a row: of 64, the two bits that say which thread and those that say which eight change places.
__device__ inline int key_at(int place) { return (place & ~30) | (place >> 3 & 3) << 1 | (place >> 1 & 3) << 3; }

/// Greater than 0 for every number, NaN included: 0 is what is not there.
__device__ inline unsigned rank_of(float x) { return ordered(x) + 1; }
__device__ inline float number_of(unsigned rank) {
  const unsigned bits = rank - 1;
  return __uint_as_float((bits & 0x80000000U) != 0 ? bits & 0x7fffffffU : ~bits);
}

/// The largest rank in [low, high] that at least `wanted` reach, or a lower one that `enough` at most do; `low` where
/// there are not so many. `reach(rank)`: how many do, none of them above `high`.
template <typename Reach>
__device__ inline unsigned bound_of(unsigned low, unsigned high, int wanted, int enough, Reach reach) {
  for (bool by_number = true; low < high; by_number = !by_number) {
    unsigned middle = high - (high - low) / 2;  // above low
    if (by_number) {  // numbers near each other differ in few of their ranks' bits: half the way of the numbers
      const unsigned between = rank_of(0.5F * number_of(low) + 0.5F * number_of(high));
      if (between > low && between <= high) middle = between;
    }
    const int count = reach(middle);
    if (count < wanted) {
      high = middle - 1;
    } else {
      low = middle;
      if (count <= enough) break;
    }
  }
  return low;
}

/// Writes the `wanted` keys of the highest ranks. visit(f) calls f(rank, key) in all lanes at once, with rank 0 where a
/// lane has nothing; ranks lie in [1, high], and at least `wanted` reach `low`.
template <typename Visit>
__device__ inline void take_highest(const ChooseOfLogits& a, unsigned low, unsigned high, std::int32_t* choice,
                                    Visit visit) {
  const auto count = [&](auto is_in) {
    int own = 0;
    visit([&](unsigned rank, int key) { own += is_in(rank, key) ? 1 : 0; });
    return __reduce_add_sync(kAll, own);
  };
  const auto reach = [&](unsigned bound) { return count([=](unsigned rank, int) { return rank >= bound; }); };
  const unsigned least = bound_of(low, high, a.chosen, a.chosen, reach);
  int limit = INT_MAX;  // of the keys of that rank
  if (reach(least) > a.chosen) {
    const int ties = a.chosen - reach(least + 1);
    int below = 0;
    limit = a.keys;
    while (limit - below > 1) {
      const int middle = (limit + below) / 2;
      if (count([=](unsigned rank, int key) { return rank == least && key < middle; }) >= ties)
        limit = middle;
      else
        below = middle;
    }
  }
  const unsigned lanes_before = (1U << threadIdx.x % 32) - 1;
  int at = 0;
  visit([&](unsigned rank, int key) {
    const bool is_in = rank > least || (rank == least && key < limit);
    const unsigned lanes = __ballot_sync(kAll, is_in);
    if (is_in) choice[at + __popc(lanes & lanes_before)] = key;
    at += __popc(lanes);
  });
}

/// The logits of the group that a list has `at` a place; place is negative behind its end.
struct Eight {
  int place = -1;
  float of[LogitRows::kGroup] = {};
  __device__ Eight(const float* logits, const std::uint16_t* groups, unsigned at, unsigned count) {
    if (at >= count) return;
    place = groups[at] * LogitRows::kGroup;
    const auto* const from = reinterpret_cast<const float4*>(logits + place);
    const float4 x = from[0], y = from[1];
    of[0] = x.x, of[1] = x.y, of[2] = x.z, of[3] = x.w;
    of[4] = y.x, of[5] = y.y, of[6] = y.z, of[7] = y.w;
  }
};

/// kEach: groups of eight logits to a lane.
template <int kEach>
__global__ void __launch_bounds__(32 * kWarps) choose(const ChooseOfLogits a) {
  __shared__ Scratch scratch[kWarps];
  let_next_start();
  wait_for_earlier();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned lanes_before = (1U << lane) - 1;
  Scratch& own = scratch[threadIdx.x / 32];
  const int item = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (item >= a.lists * a.groups) return;
  const std::int64_t row = std::int64_t{item / a.groups} * a.rows.queries + a.row_of[item % a.groups];
  const float* const logits = a.rows.logits + row * a.rows.stride;
  const auto groups = static_cast<int>(a.rows.stride / LogitRows::kGroup);

  unsigned passing = 0;  // groups
  unsigned high = 0, low = 0;
  {
    const float* const largest = a.rows.largest + row * groups;
    unsigned ranks[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = i * 32 + lane;
      ranks[i] = group < groups ? rank_of(largest[group]) : 0;
      high = max(high, ranks[i]);
    }
    high = __reduce_max_sync(kAll, high);
    low = bound_of(1, high, a.chosen, a.chosen + 32, [&](unsigned bound) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) count += ranks[i] >= bound ? 1 : 0;
      return __reduce_add_sync(kAll, count);
    });
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool passes = ranks[i] >= low;
      const unsigned lanes = __ballot_sync(kAll, passes);
      if (passes) own.groups[passing + __popc(lanes & lanes_before)] = static_cast<std::uint16_t>(i * 32 + lane);
      passing += __popc(lanes);
    }
    __syncwarp();
  }

  const auto visit_logits = [&](auto f) {
    Eight next(logits, own.groups, lane, passing);
    for (unsigned first = 0; first < passing; first += 32) {
      const Eight now = next;
      next = Eight(logits, own.groups, first + 32 + lane, passing);
#pragma unroll
      for (int i = 0; i < LogitRows::kGroup; ++i) {
        const int key = key_at(now.place + i);
        f(now.place >= 0 && key < a.keys ? rank_of(now.of[i]) : 0, key);
      }
    }
  };
  const auto collect = [&] {
    int found = 0;
    visit_logits([&](unsigned rank, int key) {
      const unsigned lanes = __ballot_sync(kAll, rank >= low);
      const int at = found + __popc(lanes & lanes_before);
      if (rank >= low && at < kMostCandidates) {
        own.ranks[at] = rank;
        own.keys[at] = static_cast<std::uint16_t>(key);
      }
      found += __popc(lanes);
    });
    return found;
  };
  int found = collect();
  if (found > kMostCandidates) {  // where large logits lie side by side
    low = bound_of(low, high, a.chosen, kMostCandidates, [&](unsigned bound) {
      int count = 0;
      visit_logits([&](unsigned rank, int) { count += rank >= bound ? 1 : 0; });
      return __reduce_add_sync(kAll, count);
    });
    found = collect();
  }
  __syncwarp();
  std::int32_t* const choice = a.choice + std::int64_t{item} * a.chosen;
  if (found > kMostCandidates) return take_highest(a, low, high, choice, visit_logits);  // that many are equal
  unsigned ranks[kMostCandidates / 32];
  int keys[kMostCandidates / 32];
#pragma unroll
  for (int i = 0; i < kMostCandidates / 32; ++i) {
    const int at = i * 32 + lane;
    ranks[i] = at < found ? own.ranks[at] : 0;
    keys[i] = at < found ? own.keys[at] : 0;
  }
  take_highest(a, low, high, choice, [&](auto f) {
#pragma unroll
    for (int i = 0; i < kMostCandidates / 32; ++i) f(ranks[i], keys[i]);
  });
}

template <int kEach>
void launch(const ChooseOfLogits& args, cudaStream_t stream) {
  launch_early(choose<kEach>, blocks_for(std::int64_t{args.lists} * args.groups, kWarps), 32 * kWarps, 0, stream, 1,
               args);
  check_launch("choice of keys by logits");
}

}  // namespace

void choose_of_logits(const ChooseOfLogits& args, cudaStream_t stream) {
  if (args.lists <= 0 || args.groups <= 0 || args.chosen <= 0) return;
  if (args.rows.stride > ChooseOfLogits::kMostKeys || args.chosen > ChooseOfLogits::kMostChosen ||
      args.chosen > args.keys)
    throw Error(ErrorKind::usage, "this many keys cannot be chosen of logits on a GPU");
  if (args.rows.stride <= 32 * 32 * LogitRows::kGroup)
    launch<32>(args, stream);
  else
    launch<48>(args, stream);
}

}  // namespace sparvar::cuda
