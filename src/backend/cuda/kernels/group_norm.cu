// Group norm of feature maps [batch, pixels, channels] in three steps: statistics of slices of a picture, their merging
// in a fixed order, and y = silu(x a + b). Memory traffic is what counts: 16-byte loads and stores.
#include <algorithm>
#include <initializer_list>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;             // of 16 bytes that a thread has in flight
constexpr int kMostSlices = 1056;     // of one picture in the statistics: two waves of 4 blocks on 132 SMs
constexpr int kApplyPixelsEach = 16;  // pixels a thread normalises: what it reads of a and b pays off

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

/// Elements of 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ inline void unpack(const uint4& packed, float (&x)[4]) {
  x[0] = __uint_as_float(packed.x);
  x[1] = __uint_as_float(packed.y);
  x[2] = __uint_as_float(packed.z);
  x[3] = __uint_as_float(packed.w);
}
__device__ inline void unpack(const uint4& packed, float (&x)[8]) {
  const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
  }
}
__device__ inline uint4 pack(const float (&x)[4]) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}
__device__ inline uint4 pack(const float (&x)[8]) {
  uint4 packed;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return packed;
}

template <typename T>
__device__ inline float silu_of(float x) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(x, 1.0F + __expf(-x));  // exact enough for bf16; the accurate form costs more than the memory
  else
    return x / (1.0F + expf(-x));
}

/// A picture's pixels are cut into slices whose statistics are merged in a fixed order.
struct Slices {
  std::int64_t pixels;
  int channels;
  int groups;
  std::int64_t step;  // pixels of a slice
  int count;

  Slices(std::int64_t pixels_, int channels_, int groups_, std::int64_t smallest_step)
      : pixels(pixels_), channels(channels_), groups(groups_) {
    step = std::max((pixels + kMostSlices - 1) / kMostSlices, smallest_step);
    count = static_cast<int>((pixels + step - 1) / step);
  }
  __host__ __device__ int per_group() const { return channels / groups; }
  __device__ std::int64_t first(int slice) const { return slice * step; }
  __device__ std::int64_t last(int slice) const { return slice + 1 == count ? pixels : (slice + 1) * step; }
};

/// Mean and sum of squared deviations of `count` values of which sums of (x - shift) and its square are known.
__device__ inline float2 moments(float shift, float sum, float squares, float count) {
  const float mean = sum / count;
  return {shift + mean, fmaxf(0.0F, squares - sum * mean)};
}

/// A thread holds 16 bytes of channels and walks over the pixels of the block's slice. Sums are taken around the
/// slice's first value of each group, so that a large mean does not swallow the variance.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    slice_moments(const T* __restrict__ x, const Slices slices, float2* __restrict__ out) {
  constexpr int kN = kVector<T>;
  __shared__ float2 sums[kThreads * kN];
  const int slice = blockIdx.x % slices.count;
  const std::int64_t b = blockIdx.x / slices.count;
  const int vectors = slices.channels / kN;
  const int rows = kThreads / vectors;
  const int row = threadIdx.x / vectors;
  const int vector = threadIdx.x % vectors;
  const int per_group = slices.per_group();
  const std::int64_t first = slices.first(slice);
  const std::int64_t last = slices.last(slice);
  x += b * slices.pixels * slices.channels;
  const T* origin = x + first * slices.channels;
  if (row < rows) {
    float shift[kN], sum[kN], squares[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      shift[j] = read(origin[(vector * kN + j) / per_group * per_group]);
      sum[j] = squares[j] = 0;
    }
    const auto add = [&](const uint4& packed) {
      float values[kN];
      unpack(packed, values);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float d = values[j] - shift[j];
        sum[j] += d;
        squares[j] += d * d;
      }
    };
    const auto* from = reinterpret_cast<const uint4*>(x) + vector;
    std::int64_t p = first + row;
    for (; p + (kLoads - 1) * rows < last; p += kLoads * rows) {
      uint4 loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) loaded[i] = __ldg(from + (p + i * rows) * vectors);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) add(loaded[i]);
    }
    for (; p < last; p += rows) add(__ldg(from + p * vectors));
#pragma unroll
    for (int j = 0; j < kN; ++j) sums[j * kThreads + threadIdx.x] = {sum[j], squares[j]};
  }
  __syncthreads();
  // A warp per group: channel c of row r lies at [c % kN][r * vectors + c / kN].
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < slices.groups; g += kThreads / 32) {
    float sum = 0, squares = 0;
    for (int i = lane; i < rows * per_group; i += 32) {
      const int c = g * per_group + i % per_group;
      const float2 part = sums[c % kN * kThreads + i / per_group * vectors + c / kN];
      sum += part.x;
      squares += part.y;
    }
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    if (lane == 0)
      out[(b * slices.groups + g) * slices.count + slice] =
          moments(read(origin[g * per_group]), sum, squares, static_cast<float>((last - first) * per_group));
  }
}

/// Sum over the block, the same in every thread. `shared`: a value per warp.
template <typename F>
__device__ inline F block_sum(F x, F* shared) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffU, x, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  F total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += shared[warp];
  return total;
}

/// Any number of channels: a block per slice and group.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    slice_moments_any(const T* __restrict__ x, const Slices slices, float2* __restrict__ out) {
  __shared__ float shared[kThreads / 32];
  const int slice = blockIdx.x % slices.count;
  const std::int64_t group = blockIdx.x / slices.count;  // of the batch's
  const int per_group = slices.per_group();
  const std::int64_t first = slices.first(slice);
  const std::int64_t values = (slices.last(slice) - first) * per_group;
  const T* from =
      x + (group / slices.groups * slices.pixels + first) * slices.channels + group % slices.groups * per_group;
  const float shift = read(from[0]);
  float sum = 0, squares = 0;
  for (std::int64_t i = threadIdx.x; i < values; i += kThreads) {
    const float d = read(from[i / per_group * slices.channels + i % per_group]) - shift;
    sum += d;
    squares += d * d;
  }
  sum = block_sum(sum, shared);
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) out[group * slices.count + slice] = moments(shift, sum, squares, static_cast<float>(values));
}

/// Merges the slices of one group: norm and affine as x * a + b. A block per group of the batch.
__global__ void __launch_bounds__(kThreads)
    merge_moments(const float2* __restrict__ parts, const Slices slices, const float* __restrict__ weight,
                  const float* __restrict__ bias, float eps, float2* __restrict__ affine) {
  __shared__ double shared[kThreads / 32];
  const std::int64_t group = blockIdx.x;
  const int per_group = slices.per_group();
  parts += group * slices.count;
  const double step = static_cast<double>(slices.step);
  const double last = static_cast<double>(slices.pixels - slices.first(slices.count - 1));
  const auto pixels_of = [&](int slice) { return slice + 1 == slices.count ? last : step; };
  double sum = 0;
  for (int i = threadIdx.x; i < slices.count; i += kThreads) sum += pixels_of(i) * parts[i].x;
  const double mean = block_sum(sum, shared) / static_cast<double>(slices.pixels);
  double squares = 0;
  for (int i = threadIdx.x; i < slices.count; i += kThreads) {
    const float2 part = parts[i];
    squares += part.y + pixels_of(i) * per_group * (part.x - mean) * (part.x - mean);
  }
  const double variance = block_sum(squares, shared) / (static_cast<double>(slices.pixels) * per_group);
  const double inverse = 1.0 / sqrt(variance + static_cast<double>(eps));
  for (int j = threadIdx.x; j < per_group; j += kThreads) {
    const std::int64_t c = group % slices.groups * per_group + j;
    const double a = weight[c] * inverse;
    affine[group * per_group + j] = {static_cast<float>(a), static_cast<float>(bias[c] - mean * a)};
  }
}

/// y = x * a + b, silu. The last pixels go first: they may still be in the L2 cache from the statistics.
template <typename T, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    apply_affine(const T* __restrict__ x, const float2* __restrict__ affine, std::int64_t pixels, int channels,
                 unsigned blocks_each, int pixels_each, T* __restrict__ out) {
  constexpr int kN = kVector<T>;
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const std::int64_t b = block / blocks_each;
  const int vectors = channels / kN;
  const int rows = kThreads / vectors;
  const int row = threadIdx.x / vectors;
  const int vector = threadIdx.x % vectors;
  if (row >= rows) return;
  float scale[kN], shift[kN];
  const auto* factors = reinterpret_cast<const float4*>(affine + b * channels + vector * kN);
#pragma unroll
  for (int j = 0; j < kN / 2; ++j) {
    const float4 two = __ldg(factors + j);
    scale[2 * j] = two.x;
    shift[2 * j] = two.y;
    scale[2 * j + 1] = two.z;
    shift[2 * j + 1] = two.w;
  }
  const auto* from = reinterpret_cast<const uint4*>(x) + b * pixels * vectors + vector;
  auto* to = reinterpret_cast<uint4*>(out) + b * pixels * vectors + vector;
  const std::int64_t begin = std::int64_t{block % blocks_each} * pixels_each * rows + row;
  for (int at = 0; at < pixels_each; at += kLoads) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t p = begin + (at + i) * rows;
      if (p < pixels && at + i < pixels_each) loaded[i] = __ldg(from + p * vectors);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t p = begin + (at + i) * rows;
      if (p >= pixels || at + i >= pixels_each) continue;
      float values[kN];
      unpack(loaded[i], values);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        values[j] = fmaf(values[j], scale[j], shift[j]);
        if constexpr (kSilu) values[j] = silu_of<T>(values[j]);
      }
      to[p * vectors] = pack(values);
    }
  }
}

template <typename T, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    apply_affine_any(const T* __restrict__ x, const float2* __restrict__ affine, std::int64_t count,
                     std::int64_t picture, int channels, T* __restrict__ out) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const float2 factors = __ldg(affine + i / picture * channels + i % channels);
  const float value = fmaf(read(x[i]), factors.x, factors.y);
  out[i] = rounded<T>(kSilu ? silu_of<T>(value) : value);
}

template <typename T, bool kSilu>
void normalise_vectors(const T* x, int batch, const Slices& slices, const float2* affine, T* out, cudaStream_t stream) {
  const int rows = kThreads / (slices.channels / kVector<T>);
  // Small maps: a pixel per thread, for blocks enough.
  const bool large = slices.pixels * batch / rows >= std::int64_t{kApplyPixelsEach} * 132 * 8;
  const int each = large ? kApplyPixelsEach : 1;
  const unsigned blocks = blocks_for(slices.pixels, std::int64_t{each} * rows);
  apply_affine<T, kSilu><<<blocks* static_cast<unsigned>(batch), kThreads, 0, stream>>>(
      x, affine, slices.pixels, slices.channels, blocks, each, out);
}

template <typename T>
void normalise_groups(const T* x, int batch, const Slices& slices, const float* weight, const float* bias, float eps,
                      bool silu, bool vectors, float2* scratch, T* out, cudaStream_t stream) {
  const auto pictures = static_cast<unsigned>(batch);
  const unsigned all_groups = pictures * static_cast<unsigned>(slices.groups);
  const auto count = static_cast<unsigned>(slices.count);
  float2* affine = scratch;
  float2* parts = scratch + std::int64_t{batch} * slices.channels;
  if (vectors)
    slice_moments<T><<<pictures * count, kThreads, 0, stream>>>(x, slices, parts);
  else
    slice_moments_any<T><<<all_groups * count, kThreads, 0, stream>>>(x, slices, parts);
  check_launch("slice_moments");
  merge_moments<<<all_groups, kThreads, 0, stream>>>(parts, slices, weight, bias, eps, affine);
  check_launch("merge_moments");
  const std::int64_t picture = slices.pixels * slices.channels;
  if (vectors && silu)
    normalise_vectors<T, true>(x, batch, slices, affine, out, stream);
  else if (vectors)
    normalise_vectors<T, false>(x, batch, slices, affine, out, stream);
  else if (silu)
    apply_affine_any<T, true><<<blocks_for(batch * picture, kThreads), kThreads, 0, stream>>>(
        x, affine, batch * picture, picture, slices.channels, out);
  else
    apply_affine_any<T, false><<<blocks_for(batch * picture, kThreads), kThreads, 0, stream>>>(
        x, affine, batch * picture, picture, slices.channels, out);
  check_launch("apply_affine");
}

}  // namespace

std::int64_t group_norm_scratch(int batch, std::int64_t pixels, int channels, int groups) {
  const std::int64_t most = std::min<std::int64_t>(pixels, kMostSlices);
  return std::int64_t{batch} * (channels + groups * most) * static_cast<std::int64_t>(sizeof(float2));
}

void group_norm(const void* x, DType type, int batch, std::int64_t pixels, int channels, int groups,
                const float* weight, const float* bias, float eps, bool silu, void* scratch, void* out,
                cudaStream_t stream) {
  if (batch <= 0 || pixels <= 0 || channels <= 0) return;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int vectors = channels / kVector<T>;
    const bool whole = channels % kVector<T> == 0 && vectors <= kThreads && aligned({x, out, scratch});
    // A few pixels per thread at least, where there are pixels enough.
    const std::int64_t smallest = whole ? std::int64_t{kLoads} * (kThreads / vectors) : 64;
    const Slices slices(pixels, channels, groups, smallest);
    normalise_groups<T>(static_cast<const T*>(x), batch, slices, weight, bias, eps, silu, whole,
                        static_cast<float2*>(scratch), static_cast<T*>(out), stream);
  });
}

}  // namespace sparvar::cuda
