// Which keys a tile reads, found on the device: the largest column sums of a row, and lists made of such choices.
#include <algorithm>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kFew = 64;                  // of which a warp finds any
constexpr unsigned kTaken = 0xffffffffU;  // of a value that was chosen already; no number is ordered as high

/// Sum of the values of all threads before this one, of kOfBlock; `total` of all. All threads call it.
template <int kOfBlock>
__device__ inline unsigned sum_before(unsigned x, unsigned& total) {
  constexpr int kWarps = kOfBlock / 32;
  __shared__ unsigned of_warp[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  unsigned sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(0xffffffffU, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  unsigned before = sum - x;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warp[w];
    total += of_warp[w];
  }
  return before;
}

/// The wanted-th largest of the values that are left.
struct Threshold {
  unsigned value;
  unsigned ties;  // how many of its equals belong to the wanted
};

/// Of at most kFew values; one warp calls it.
__device__ inline Threshold threshold_of_few(const unsigned* few, unsigned count, unsigned wanted) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned own = lane; own < count; own += 32) {
    unsigned larger = 0, equal = 0;
    for (unsigned i = 0; i < count; ++i) {
      larger += few[i] > few[own] ? 1 : 0;
      equal += few[i] == few[own] ? 1 : 0;
    }
    if (larger < wanted && wanted <= larger + equal) return {few[own], wanted - larger};
  }
  return {0, 0};
}

/// Values lie in [low, high] or are taken. Bins of equal width narrow that down, until few are left or all are equal.
/// All threads call it.
__device__ inline Threshold threshold_of(const unsigned* values, int keys, unsigned wanted, unsigned low,
                                         unsigned high) {
  __shared__ unsigned bins[kBins];
  __shared__ unsigned few[kFew];
  __shared__ unsigned found[3];
  while (low != high) {
    const int shift = max(32 - __clz(static_cast<int>(low ^ high)) - kBinBits, 0);
    const unsigned base = low >> shift;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < keys; i += kThreads)
      if (const unsigned v = values[i]; v >= low && v <= high) atomicAdd(&bins[(v >> shift) - base], 1U);
    __syncthreads();
    // Bins from the largest down, as many to each thread.
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * (kBins / kThreads);
    unsigned sum = 0;
    for (int i = 0; i < kBins / kThreads; ++i) sum += bins[top - i];
    unsigned total = 0;
    unsigned above = sum_before<kThreads>(sum, total);
    if (above < wanted && wanted <= above + sum) {
      int bin = top;
      while (above + bins[bin] < wanted) above += bins[bin--];
      found[0] = base + static_cast<unsigned>(bin);
      found[1] = wanted - above;
      found[2] = 0;
    }
    __syncthreads();
    const unsigned bin = found[0];
    const unsigned members = bins[bin - base];
    wanted = found[1];
    low = max(low, bin << shift);
    high = min(high, (bin << shift) + ((1U << shift) - 1));
    __syncthreads();
    if (low == high || members > kFew) continue;
    for (int i = static_cast<int>(threadIdx.x); i < keys; i += kThreads)
      if (const unsigned v = values[i]; v >= low && v <= high) few[atomicAdd(&found[2], 1U)] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
      const Threshold own = threshold_of_few(few, members, wanted);
      const unsigned lanes = __ballot_sync(0xffffffffU, own.ties > 0);
      if (static_cast<int>(threadIdx.x) == __ffs(static_cast<int>(lanes)) - 1)
        found[0] = own.value, found[1] = own.ties;
    }
    __syncthreads();
    const Threshold out = {found[0], found[1]};
    __syncthreads();
    return out;
  }
  return {low, wanted};
}

__host__ __device__ inline int words_of(int keys) { return (keys + 31) / 32; }

struct Counts {
  int of[kMostCounts];
  int count;
  int total;
};

__global__ void __launch_bounds__(kThreads)
    choose(const float* sums, int keys, const Counts counts, std::int32_t* choice) {
  extern __shared__ unsigned values[];
  let_next_start();
  wait_for_earlier();
  sums += std::int64_t{blockIdx.x} * keys;
  choice += std::int64_t{blockIdx.x} * counts.total;
  __shared__ unsigned low, high;
  if (threadIdx.x == 0) low = kTaken, high = 0;
  __syncthreads();
  unsigned own_low = kTaken, own_high = 0;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < keys; i += kThreads) {
    const unsigned v = ordered(sums[i]);
    values[i] = v;
    own_low = min(own_low, v);
    own_high = max(own_high, v);
  }
  own_low = __reduce_min_sync(0xffffffffU, own_low);
  own_high = __reduce_max_sync(0xffffffffU, own_high);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&low, own_low);
    atomicMax(&high, own_high);
  }
  __syncthreads();
  unsigned most = high;  // of the values that are left
  // A thread's own part; of an odd number of words, so that threads do not meet in a bank.
  const int each = (keys + kThreads - 1) / kThreads | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * each, keys);
  const int end = min(begin + each, keys);
  for (int c = 0; c < counts.count; ++c) {
    if (counts.of[c] == 0) continue;
    const Threshold threshold = threshold_of(values, keys, static_cast<unsigned>(counts.of[c]), low, most);
    most = threshold.value;
    unsigned larger = 0, equal = 0;
    for (int i = begin; i < end; ++i) {
      larger += values[i] != kTaken && values[i] > threshold.value ? 1 : 0;
      equal += values[i] == threshold.value ? 1 : 0;
    }
    unsigned total = 0;
    unsigned at = sum_before<kThreads>(larger, total);
    unsigned ties = sum_before<kThreads>(equal, total);
    for (int i = begin; i < end; ++i) {
      const bool is_equal = values[i] == threshold.value;
      const bool chosen = is_equal ? ties < threshold.ties : values[i] != kTaken && values[i] > threshold.value;
      if (chosen) {
        choice[at + min(ties, threshold.ties)] = i;
        values[i] = kTaken;
      }
      if (is_equal)
        ++ties;
      else if (chosen)
        ++at;
    }
    choice += counts.of[c];
    __syncthreads();
  }
}

/// kStaged: a list is put together in shared memory, and written 16 bytes at a time.
template <int kOfBlock, bool kStaged>
__global__ void __launch_bounds__(kOfBlock) make_lists(const BuildLists a) {
  extern __shared__ __align__(16) unsigned words[];
  let_next_start();
  wait_for_earlier();
  const auto tile = static_cast<int>(blockIdx.x);
  const auto list = static_cast<int>(blockIdx.y);
  const int count = words_of(a.keys);
  const std::int32_t* const choice = a.choice + (std::int64_t{list} * a.groups + a.group_of[tile]) * a.per_group;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kOfBlock)
    words[i] = a.fixed == nullptr ? 0 : a.fixed[std::int64_t{tile} * count + i];
  __syncthreads();
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < a.chosen; i += kOfBlock) {
    const int key = a.map == nullptr ? choice[i] : a.map[choice[i]];
    if (key >= 0 && key < a.keys) atomicOr(&words[key / 32], 1U << key % 32);
  }
  __syncthreads();
  const int each = (count + kOfBlock - 1) / kOfBlock;
  const int begin = min(static_cast<int>(threadIdx.x) * each, count);
  const int end = min(begin + each, count);
  unsigned own = 0;
  for (int i = begin; i < end; ++i) own += __popc(words[i]);
  unsigned total = 0;
  unsigned at = sum_before<kOfBlock>(own, total);
  const std::int64_t place = std::int64_t{list} * a.tiles + tile;
  std::int32_t* const to = a.list_keys + place * a.capacity;
  auto* const staged = reinterpret_cast<std::int32_t*>(words + (count + 3) / 4 * 4);
  for (int i = begin; i < end; ++i)
    for (unsigned word = words[i]; word != 0; word &= word - 1)
      if (at < a.capacity) (kStaged ? staged : to)[at++] = i * 32 + __ffs(static_cast<int>(word)) - 1;
  const auto keys = static_cast<int>(min(std::int64_t{total}, a.capacity));
  if (threadIdx.x == 0) {
    a.ranges[place] = {.first = place * a.capacity, .keys = keys, .unused = 0};
    if (a.pairs != nullptr)
      atomicAdd(a.pairs, static_cast<unsigned long long>(keys) * static_cast<unsigned long long>(a.queries[tile]));
  }
  if constexpr (kStaged) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < (keys + 3) / 4; i += kOfBlock)  // capacity is a multiple of four
      reinterpret_cast<int4*>(to)[i] = reinterpret_cast<const int4*>(staged)[i];
  }
}

}  // namespace

int most_selected_keys() { return 200 * 1024 / static_cast<int>(sizeof(unsigned)); }

void select_keys(const float* sums, std::int64_t rows, int keys, const int* counts, int count_of_counts,
                 std::int32_t* choice, cudaStream_t stream) {
  if (rows <= 0 || keys <= 0) return;
  if (keys > most_selected_keys() || count_of_counts > kMostCounts)
    throw Error(ErrorKind::usage, "this many keys cannot be chosen from on a GPU");
  Counts all{.of = {}, .count = count_of_counts, .total = 0};
  for (int i = 0; i < count_of_counts; ++i) all.total += all.of[i] = counts[i];
  static const cudaError_t allowed = cudaFuncSetAttribute(choose, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                          most_selected_keys() * static_cast<int>(sizeof(unsigned)));
  (void)allowed;  // a refusal shows at the launch
  launch_early(choose, static_cast<unsigned>(rows), kThreads, static_cast<std::size_t>(keys) * sizeof(unsigned), stream,
               1, sums, keys, all, choice);
  check_launch("choice of keys");
}

void build_lists(const BuildLists& args, cudaStream_t stream) {
  if (args.tiles <= 0 || args.lists <= 0) return;
  constexpr std::size_t kMostBytes = 48 * 1024;
  const std::size_t words = static_cast<std::size_t>(words_of(args.keys)) * sizeof(unsigned);
  const std::size_t staged = (words + 15) / 16 * 16 + static_cast<std::size_t>(args.capacity) * sizeof(std::int32_t);
  if (args.lists > 65535 || words > kMostBytes)
    throw Error(ErrorKind::usage, "lists of keys on a GPU: 65535 heads and 393216 keys at most");
  const dim3 blocks(static_cast<unsigned>(args.tiles), static_cast<unsigned>(args.lists));
  if (args.staged && staged <= kMostBytes - 1024 && args.capacity % 4 == 0)
    launch_early(make_lists<128, true>, blocks, 128, staged, stream, 1, args);
  else
    launch_early(make_lists<512, false>, blocks, 512, words, stream, 1, args);
  check_launch("lists of keys");
}

}  // namespace sparvar::cuda
