// Convolutions of feature maps in bf16 as implicit matrix products: rows are output pixels, columns output channels,
// the depth runs over (tap, input channel) in the order of the weights. Pixels are gathered while they are copied to
// shared memory (several stages ahead); missing ones become zeros. Matrix products are m16n8k16 of the tensor cores of
// compute capability 8.0 and newer.
#include <bit>

#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/mma.cuh"

namespace sparvar::cuda {

void convolution_f32(const OwnConvolution& args, cudaStream_t stream);

namespace {

constexpr int kDepth = 32;            // of one stage
constexpr int kVectors = kDepth / 8;  // 16 bytes each, in a row of a stage
constexpr int kThreads = 128;
constexpr int kRowsAtOnce = kThreads / kVectors;

/// 16 bytes to shared memory, zeros where there is no source; through the first cache: taps read the same pixels.
__device__ inline void copy_cached(unsigned to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ inline float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000U); }

/// Division of numbers below 2^31 by one that the host knows.
struct Divider {
  unsigned multiplier = 0;  // 0: by one
  unsigned shift = 0;
};
Divider divider(unsigned by) {
  if (by == 1) return {};
  const auto bits = static_cast<unsigned>(std::bit_width(by - 1));
  return {static_cast<unsigned>(((std::uint64_t{1} << (31 + bits)) + by - 1) / by), bits - 1};
}
__device__ inline unsigned quotient(unsigned x, Divider by) {
  return by.multiplier == 0 ? x : __umulhi(x, by.multiplier) >> by.shift;
}

struct Problem {
  const bf16* x;
  const bf16* w;
  const float* bias;
  const bf16* residual;
  bf16* y;
  int pixels;                   // of all maps of y
  int seen_height, seen_width;  // of a map of x, enlarged where it is read so
  int enlarged;                 // 1 or 0
  int height, width, in, out;   // of x as it is stored
  int kernel, taps, stride, pad;
  int depth;                   // taps * in
  int tap_step, channel_step;  // from one stage to the next: kDepth / in and kDepth % in
  int out_width, out_height;
  Divider by_out_width, by_out_height, by_out_tiles;
  int out_tiles;
  bool wide, pairs;  // may y and the residual be accessed 16 and 4 bytes at a time?
};

/// Where the first tap of an output pixel falls on the map, and the first row of that map in x.
struct Corner {
  int y, x, row;
};
__device__ inline Corner corner_of(const Problem& p, int pixel) {
  if (pixel >= p.pixels) return {-(1 << 30), 0, 0};  // off the map with every tap
  const auto row = static_cast<int>(quotient(static_cast<unsigned>(pixel), p.by_out_width));
  const auto map = static_cast<int>(quotient(static_cast<unsigned>(row), p.by_out_height));
  return {(row - map * p.out_height) * p.stride - p.pad, (pixel - row * p.out_width) * p.stride - p.pad,
          map * p.height};
}

/// Rows of 64 bytes; vectors change places so that eight rows of one vector fill all banks.
__device__ inline int place(int row, int vector) { return row * kDepth + (vector ^ (row / 2 % kVectors)) * 8; }

/// A thread copies the same vector of every kRowsAtOnce-th row, stage after stage.
template <int kPixels, int kOut, bool kWhole>  // kWhole: no vector spans two taps
struct Loader {
  static constexpr int kPixelRows = kPixels / kRowsAtOnce;
  static constexpr int kOutRows = (kOut + kRowsAtOnce - 1) / kRowsAtOnce;
  Corner corners[kPixelRows];
  int row, vector;   // of this thread
  int first_out;     // output channel of its first row
  int tap, channel;  // of its vector's first element in the stage to load next
  int depth = 0;     // of that element

  __device__ Loader(const Problem& p, int first_pixel, int first_out_of_block)
      : row(static_cast<int>(threadIdx.x) / kVectors), vector(static_cast<int>(threadIdx.x) % kVectors) {
    depth = vector * 8;
    tap = depth / p.in;
    channel = depth % p.in;
    first_out = first_out_of_block + row;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) corners[i] = corner_of(p, first_pixel + row + i * kRowsAtOnce);
  }

  /// The element (tap, channel) of an output pixel's neighbourhood, null where it is off the map.
  static __device__ const bf16* source(const Problem& p, const Corner& corner, int tap, int channel) {
    const int tap_y = p.kernel == 3 ? tap * 11 / 32 : 0;
    const int y = corner.y + tap_y;
    const int x = corner.x + tap - tap_y * p.kernel;
    const bool there = tap < p.taps && static_cast<unsigned>(y) < static_cast<unsigned>(p.seen_height) &&
                       static_cast<unsigned>(x) < static_cast<unsigned>(p.seen_width);
    const int pixel = (corner.row + (y >> p.enlarged)) * p.width + (x >> p.enlarged);
    return there ? p.x + std::int64_t{pixel} * p.in + channel : nullptr;
  }

  __device__ void load_whole(const Problem& p, bf16* pixels, bf16* weights) const {
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const bf16* from = source(p, corners[i], tap, channel);
      copy_cached(shared_address(pixels + place(row + i * kRowsAtOnce, vector)), from != nullptr ? from : p.x,
                  from != nullptr);
    }
#pragma unroll
    for (int i = 0; i < kOutRows; ++i) {
      if (kOut < kRowsAtOnce && row >= kOut) break;
      const int out = first_out + i * kRowsAtOnce;
      const bool there = out < p.out && depth < p.depth;
      copy_async(shared_address(weights + place(row + i * kRowsAtOnce, vector)),
                 p.w + (there ? std::int64_t{out} * p.depth + depth : 0), there);
    }
  }

  /// Any number of channels: element by element.
  __device__ void load_parts(const Problem& p, bf16* pixels, bf16* weights) const {
    for (int i = 0; i < kPixelRows; ++i) {
      unsigned words[4] = {};
      int t = tap;
      int c = channel;
      for (int j = 0; j < 8; ++j) {
        const bf16* from = source(p, corners[i], t, c);
        if (from != nullptr) words[j / 2] |= unsigned{*reinterpret_cast<const std::uint16_t*>(from)} << j % 2 * 16;
        if (++c == p.in) {
          c = 0;
          ++t;
        }
      }
      *reinterpret_cast<uint4*>(pixels + place(row + i * kRowsAtOnce, vector)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    for (int i = 0; i < kOutRows; ++i) {
      if (kOut < kRowsAtOnce && row >= kOut) break;
      const int out = first_out + i * kRowsAtOnce;
      const auto* from = reinterpret_cast<const std::uint16_t*>(p.w) + std::int64_t{out} * p.depth + depth;
      unsigned words[4] = {};
      for (int j = 0; j < 8; ++j)
        if (out < p.out && depth + j < p.depth) words[j / 2] |= unsigned{from[j]} << j % 2 * 16;
      *reinterpret_cast<uint4*>(weights + place(row + i * kRowsAtOnce, vector)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  __device__ void load(const Problem& p, bf16* pixels, bf16* weights) {
    if constexpr (kWhole)
      load_whole(p, pixels, weights);
    else
      load_parts(p, pixels, weights);
    depth += kDepth;
    tap += p.tap_step;
    channel += p.channel_step;
    if (channel >= p.in) {
      channel -= p.in;
      ++tap;
    }
  }
};

/// Lane i of four holds word j of (i, j); afterwards it holds (j, i).
__device__ inline void transpose(unsigned (&x)[4], int lane) {
  const bool odd = lane % 2 != 0;
  const bool upper = lane / 2 % 2 != 0;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const unsigned got = __shfl_xor_sync(0xffffffffU, odd ? x[j] : x[j + 1], 1);
    (odd ? x[j] : x[j + 1]) = got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const unsigned got = __shfl_xor_sync(0xffffffffU, upper ? x[j] : x[j + 2], 2);
    (upper ? x[j] : x[j + 2]) = got;
  }
}

template <int kPixels_, int kOut_, int kWarpPixels_, int kWarpOut_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kPixels = kPixels_, kOut = kOut_;
  static constexpr int kWarpPixels = kWarpPixels_, kWarpOut = kWarpOut_;  // of one warp of the four
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // wanted on one multiprocessor
  static constexpr int kStageSize = (kPixels + kOut) * kDepth;
  static constexpr int kSharedBytes = kStages * kStageSize * 2;
  static constexpr int kM = kWarpPixels / 16, kN = kWarpOut / 8;
  static_assert(kPixels / kWarpPixels * (kOut / kWarpOut) * 32 == kThreads);
};

template <typename T>
__device__ inline void multiply_stage(const bf16* pixels, const bf16* weights, float (&sum)[T::kM][T::kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned a_base = shared_address(pixels);
  const unsigned b_base = shared_address(weights);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    unsigned a[T::kM][4];
    unsigned b[T::kN / 2][4];
#pragma unroll
    for (int m = 0; m < T::kM; ++m)
      load_matrices(a[m], a_base + 2 * (m * 16 * kDepth + place(lane % 16, step * 2 + lane / 16)));
#pragma unroll
    for (int n = 0; n < T::kN / 2; ++n)
      load_matrices(b[n], b_base + 2 * (n * 16 * kDepth + place(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2)));
#pragma unroll
    for (int m = 0; m < T::kM; ++m)
#pragma unroll
      for (int n = 0; n < T::kN; ++n) multiply(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

/// 32 channels of one pixel by four lanes, 16 bytes each.
template <int kN>
__device__ inline void write_wide(const Problem& p, const float (&sum)[kN][4], int half, int n, int pixel, int out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int channel = out + (n + lane % 4) * 8;
  const bool there = pixel < p.pixels && channel < p.out;
  const std::int64_t at = std::int64_t{pixel} * p.out + channel;
  unsigned words[4] = {};
  if (p.residual != nullptr) {
    if (there) {
      const uint4 added = *reinterpret_cast<const uint4*>(p.residual + at);
      words[0] = added.x, words[1] = added.y, words[2] = added.z, words[3] = added.w;
    }
    transpose(words, lane);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int own = out + (n + j) * 8 + lane % 4 * 2;
    const float2 bias = own < p.out ? *reinterpret_cast<const float2*>(p.bias + own) : make_float2(0, 0);
    words[j] = pack(sum[n + j][2 * half] + bias.x + low_half(words[j]),
                    sum[n + j][2 * half + 1] + bias.y + high_half(words[j]));
  }
  transpose(words, lane);
  if (there) *reinterpret_cast<uint4*>(p.y + at) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// The two neighbouring channels that a lane holds.
__device__ inline void write_pair(const Problem& p, float low, float high, int pixel, int channel) {
  if (pixel >= p.pixels || channel >= p.out) return;
  const std::int64_t at = std::int64_t{pixel} * p.out + channel;
  const bool both = channel + 1 < p.out;
  low += p.bias[channel];
  if (both) high += p.bias[channel + 1];
  if (p.pairs) {
    if (p.residual != nullptr) {
      const unsigned added = *reinterpret_cast<const unsigned*>(p.residual + at);
      low += low_half(added);
      high += high_half(added);
    }
    *reinterpret_cast<unsigned*>(p.y + at) = pack(low, high);
    return;
  }
  if (p.residual != nullptr) {
    low += read(p.residual[at]);
    if (both) high += read(p.residual[at + 1]);
  }
  p.y[at] = rounded<bf16>(low);
  if (both) p.y[at + 1] = rounded<bf16>(high);
}

template <typename T>
__device__ inline void write(const Problem& p, const float (&sum)[T::kM][T::kN][4], int first_pixel, int first_out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < T::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + m * 16 + half * 8 + lane / 4;
      if (T::kN % 4 == 0 && p.wide) {
#pragma unroll
        for (int n = 0; n + 3 < T::kN; n += 4) write_wide<T::kN>(p, sum[m], half, n, pixel, first_out);
      } else {
#pragma unroll
        for (int n = 0; n < T::kN; ++n)
          write_pair(p, sum[m][n][2 * half], sum[m][n][2 * half + 1], pixel, first_out + n * 8 + lane % 4 * 2);
      }
    }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, T::kBlocks) convolve(const Problem p) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto* const stages = reinterpret_cast<bf16*>(memory);  // each: rows of pixels, then of weights
  const auto block = static_cast<int>(blockIdx.x);
  const auto pixel_tile = static_cast<int>(quotient(blockIdx.x, p.by_out_tiles));
  const int first_pixel = pixel_tile * T::kPixels;
  const int first_out = (block - pixel_tile * p.out_tiles) * T::kOut;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_pixel = warp / (T::kOut / T::kWarpOut) * T::kWarpPixels;
  const int warp_out = warp % (T::kOut / T::kWarpOut) * T::kWarpOut;

  Loader<T::kPixels, T::kOut, kWhole> loader(p, first_pixel, first_out);
  const int count = (p.depth + kDepth - 1) / kDepth;
  const auto load_next = [&](int into, bool there) {
    bf16* const to = stages + into * T::kStageSize;
    if (there) loader.load(p, to, to + T::kPixels * kDepth);
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < T::kStages - 1; ++stage) load_next(stage, stage < count);

  float sum[T::kM][T::kN][4] = {};
  int reading = 0;
  int writing = T::kStages - 1;
#pragma unroll 1
  for (int stage = 0; stage < count; ++stage) {
    wait_copies<T::kStages - 2>();
    __syncthreads();  // the stage is there for everybody, and everybody has left the one that is written next
    load_next(writing, stage + T::kStages - 1 < count);
    const bf16* const from = stages + reading * T::kStageSize;
    multiply_stage<T>(from + warp_pixel * kDepth, from + (T::kPixels + warp_out) * kDepth, sum);
    reading = reading + 1 == T::kStages ? 0 : reading + 1;
    writing = writing + 1 == T::kStages ? 0 : writing + 1;
  }
  write<T>(p, sum, first_pixel + warp_pixel, first_out + warp_out);
}

template <typename T, bool kWhole>
void launch(Problem p, cudaStream_t stream) {
  static const cudaError_t allowed =
      cudaFuncSetAttribute(convolve<T, kWhole>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  p.out_tiles = static_cast<int>(blocks_for(p.out, T::kOut));
  p.by_out_tiles = divider(static_cast<unsigned>(p.out_tiles));
  const unsigned blocks = blocks_for(p.pixels, T::kPixels) * static_cast<unsigned>(p.out_tiles);
  convolve<T, kWhole><<<blocks, kThreads, T::kSharedBytes, stream>>>(p);
  check_launch("convolution");
}

/// The largest tile of the list that gives every multiprocessor something to do, or else the last one.
template <bool kWhole, typename T, typename... Smaller>
void launch_fitting(const Problem& p, cudaStream_t stream) {
  constexpr std::int64_t kEnoughBlocks = T::kPixels * T::kOut >= 128 * 128 ? 200 : 128;
  if constexpr (sizeof...(Smaller) > 0)
    if (std::int64_t{blocks_for(p.pixels, T::kPixels)} * blocks_for(p.out, T::kOut) < kEnoughBlocks)
      return launch_fitting<kWhole, Smaller...>(p, stream);
  launch<T, kWhole>(p, stream);
}

using Tile128x128 = Tile<128, 128, 64, 64, 4, 2>;
using Tile128x64 = Tile<128, 64, 64, 32, 4, 3>;
using Tile128x32 = Tile<128, 32, 32, 32, 4, 4>;
using Tile128x16 = Tile<128, 16, 32, 16, 4, 5>;
using Tile64x64 = Tile<64, 64, 32, 32, 6, 4>;
using Tile64x32 = Tile<64, 32, 32, 16, 6, 4>;
using Tile64x16 = Tile<64, 16, 16, 16, 6, 4>;

Problem problem_of(const OwnConvolution& args) {
  Problem p{};
  p.x = static_cast<const bf16*>(args.x);
  p.w = static_cast<const bf16*>(args.w);
  p.bias = args.bias;
  p.residual = static_cast<const bf16*>(args.residual);
  p.y = static_cast<bf16*>(args.y);
  p.pixels = args.batch * args.out_height() * args.out_width();
  p.enlarged = args.enlarged ? 1 : 0;
  p.height = args.height;
  p.width = args.width;
  p.seen_height = args.height << p.enlarged;
  p.seen_width = args.width << p.enlarged;
  p.in = args.in;
  p.out = args.out;
  p.kernel = args.kernel;
  p.taps = args.kernel * args.kernel;
  p.stride = args.stride;
  p.pad = args.pad_begin;
  p.depth = p.taps * args.in;
  p.tap_step = kDepth / args.in;
  p.channel_step = kDepth % args.in;
  p.out_width = args.out_width();
  p.out_height = args.out_height();
  p.by_out_width = divider(static_cast<unsigned>(p.out_width));
  p.by_out_height = divider(static_cast<unsigned>(p.out_height));
  const auto aligned = [&](std::uintptr_t bytes) {
    return (reinterpret_cast<std::uintptr_t>(args.y) | reinterpret_cast<std::uintptr_t>(args.residual)) % bytes == 0;
  };
  p.wide = args.out % 8 == 0 && aligned(16) && reinterpret_cast<std::uintptr_t>(args.bias) % 8 == 0;
  p.pairs = args.out % 2 == 0 && aligned(4);
  return p;
}

void check_sizes(const OwnConvolution& args) {
  const bool kernel_fits = (args.kernel == 1 || args.kernel == 3) && args.stride >= 1 && args.in > 0;
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  const std::int64_t read = std::int64_t{args.batch} * args.height * args.width;
  const std::int64_t written = std::int64_t{args.batch} * args.out_height() * args.out_width();
  const std::int64_t blocks = (written + 63) / 64 * blocks_for(args.out, 16);
  if (!kernel_fits || read >= kMost || written >= kMost - 128 || blocks >= kMost)
    throw Error(ErrorKind::usage, "convolutions take kernels of 1 or 3 and maps of less than 2^31 pixels");
}

}  // namespace

void convolution(const OwnConvolution& args, cudaStream_t stream) {
  if (args.batch <= 0 || args.out <= 0 || args.out_height() <= 0 || args.out_width() <= 0) return;
  check_sizes(args);
  if (args.type == DType::f32) return convolution_f32(args, stream);
  const Problem p = problem_of(args);
  const bool whole = args.in % 8 == 0 && reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0 &&
                     reinterpret_cast<std::uintptr_t>(args.w) % 16 == 0;
  if (!whole)
    args.out > 16 ? launch_fitting<false, Tile128x64, Tile64x32>(p, stream)
                  : launch_fitting<false, Tile128x16, Tile64x16>(p, stream);
  else if (args.out <= 16)
    launch_fitting<true, Tile128x16, Tile64x16>(p, stream);
  else if (args.out <= 32)
    launch_fitting<true, Tile128x32, Tile64x32, Tile64x16>(p, stream);
  else if (args.out <= 64 || (args.out % 128 > 0 && args.out % 128 <= 64))
    launch_fitting<true, Tile128x64, Tile64x64, Tile64x32, Tile64x16>(p, stream);
  else
    launch_fitting<true, Tile128x128, Tile128x64, Tile64x64, Tile64x32, Tile64x16>(p, stream);
}

}  // namespace sparvar::cuda
