// Draws, bits, and codes between grids. Bits must be those of the CPU: the same draws, and f32 formulas written with
// rounding intrinsics, so that no product is fused into a sum (src/pipeline/sampling.cpp, src/visual/codes.cpp).
#include <algorithm>
#include <cmath>
#include <string>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxGridYZ = 65535;

bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// ---------------------------------------------------------------- draws

/// Philox 4x32-10, as the CPU's.
__device__ inline uint4 philox(uint4 counter, std::uint64_t key) {
  auto low = static_cast<std::uint32_t>(key);
  auto high = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{counter.x} * 0xD2511F53U;
    const std::uint64_t b = std::uint64_t{counter.z} * 0xCD9E8D57U;
    counter = make_uint4(static_cast<std::uint32_t>(b >> 32) ^ counter.y ^ low, static_cast<std::uint32_t>(b),
                         static_cast<std::uint32_t>(a >> 32) ^ counter.w ^ high, static_cast<std::uint32_t>(a));
    low += 0x9E3779B9U;
    high += 0xBB67AE85U;
  }
  return counter;
}

__device__ inline float to_uniform(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24F; }

/// Four values a thread, from the counter of their place alone: two pairs by Box and Muller.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    random_kernel(T* out, std::int64_t count, std::uint64_t seed, float deviation) {
  const std::int64_t group = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (group * 4 >= count) return;
  const uint4 words =
      philox(make_uint4(static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(group >> 32), 0, 0), seed);
  const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
  float normal[4];
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = deviation * sqrtf(-2.0F * logf(to_uniform(word[pair]) + 0x1p-25F));  // never the log of 0
    float sine, cosine;
    sincospif(2.0F * to_uniform(word[pair + 1]), &sine, &cosine);
    normal[pair] = radius * cosine;
    normal[pair + 1] = radius * sine;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (group * 4 + i < count) out[group * 4 + i] = rounded<T>(normal[i]);
}

// ---------------------------------------------------------------- bits from logits

struct Draw {
  std::uint64_t seed;
  bool greedy;
  float rarest;
};

__device__ inline std::uint8_t bit_of(float zero, float one, std::uint32_t word, const Draw& draw) {
  const bool likely = one > zero;
  // The exponential in double and rounded once: as near to the host's expf as that is to the truth.
  const auto power = static_cast<float>(exp(static_cast<double>(__fsub_rn(zero, one))));
  const float p = __fdiv_rn(1.0F, __fadd_rn(1.0F, power));
  if (draw.greedy || (likely ? __fsub_rn(1.0F, p) : p) <= draw.rarest) return likely ? 1 : 0;
  return to_uniform(word) < p ? 1 : 0;
}

/// Four bits of one token a thread: those that share a counter.
template <bool kVectors>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* logits, std::int64_t items, int groups, int tokens, int bits,
                  const std::uint64_t* sampling, int scale, std::uint8_t* out) {
  const std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= items) return;
  const std::int64_t row = item / groups;
  const int group = static_cast<int>(item - row * groups);
  const std::int64_t picture = row / tokens;
  const auto token = static_cast<std::uint32_t>(row - picture * tokens);
  const Draw draw{sampling[0], sampling[2] != 0, __uint_as_float(static_cast<std::uint32_t>(sampling[3]))};
  const std::uint64_t number = sampling[1] + static_cast<std::uint64_t>(picture);
  const uint4 words = philox(make_uint4(token, (static_cast<std::uint32_t>(scale) << 16) + group,
                                        static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32)),
                             draw.seed);
  const std::int64_t first = row * bits + group * 4;
  if constexpr (kVectors) {
    const float4 low = *reinterpret_cast<const float4*>(logits + 2 * first);
    const float4 high = *reinterpret_cast<const float4*>(logits + 2 * first + 4);
    *reinterpret_cast<uchar4*>(out + first) =
        make_uchar4(bit_of(low.x, low.y, words.x, draw), bit_of(low.z, low.w, words.y, draw),
                    bit_of(high.x, high.y, words.z, draw), bit_of(high.z, high.w, words.w, draw));
  } else {
    const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (group * 4 + i < bits)
        out[first + i] = bit_of(logits[2 * (first + i)], logits[2 * (first + i) + 1], word[i], draw);
  }
}

// ---------------------------------------------------------------- codes

/// The two neighbours of an output position along one axis and the weight of the second (half-pixel centres).
struct Tap {
  int low;
  int high;
  float weight;
};

__device__ inline Tap tap_of(int i, int in, int out) {
  const float scale = __fdiv_rn(static_cast<float>(in), static_cast<float>(out));
  const float centre = fmaxf(0.0F, __fsub_rn(__fmul_rn(scale, __fadd_rn(static_cast<float>(i), 0.5F)), 0.5F));
  const int low = min(static_cast<int>(centre), in - 1);
  return {low, min(low + 1, in - 1), __fsub_rn(centre, static_cast<float>(low))};
}

__device__ inline float mix(float low, float high, float weight) {
  return __fadd_rn(__fmul_rn(__fsub_rn(1.0F, weight), low), __fmul_rn(weight, high));
}

__device__ inline std::uint32_t byte_of(std::uint32_t word, int byte) { return word >> (8 * byte) & 0xffU; }

/// Bytes 0 to kN - 1 are 1 where the code of channel first + i at (y, x) of the codes' map is positive. The bits of a
/// token lie side by side, with patchify those of one channel in four places of the map.
template <int kN, bool kPatchify>
__device__ inline std::uint32_t signs_at(const std::uint8_t* bits, Grid tokens, int bit_count, int first, int y,
                                         int x) {
  if constexpr (!kPatchify) {
    const std::uint8_t* from = bits + (std::int64_t{y} * tokens.w + x) * bit_count + first;
    if constexpr (kN == 4) return *reinterpret_cast<const std::uint32_t*>(from);
    return *from;
  } else {
    const int place = y % 2 * 2 + x % 2;
    const std::uint8_t* from = bits + (std::int64_t{y / 2} * tokens.w + x / 2) * bit_count + 4 * first;
    if constexpr (kN == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      return byte_of(four.x, place) | byte_of(four.y, place) << 8 | byte_of(four.z, place) << 16 |
             byte_of(four.w, place) << 24;
    }
    return from[place];
  }
}

/// kN channels of one place of the full map a thread.
template <int kN, bool kPatchify>
__global__ void __launch_bounds__(kThreads) add_codes_kernel(const std::uint8_t* bits, int pictures, Grid tokens,
                                                             int bit_count, float unit, float* summed, Grid full) {
  const std::int64_t place = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t plane = std::int64_t{full.h} * full.w;
  if (place >= plane) return;
  const int y = static_cast<int>(place / full.w);
  const int x = static_cast<int>(place % full.w);
  const int channels = kPatchify ? bit_count / 4 : bit_count;
  const Tap row = tap_of(y, kPatchify ? 2 * tokens.h : tokens.h, full.h);
  const Tap column = tap_of(x, kPatchify ? 2 * tokens.w : tokens.w, full.w);
  const auto code = [unit](std::uint32_t signs, int i) { return byte_of(signs, i) != 0 ? unit : -unit; };
  for (int b = static_cast<int>(blockIdx.z); b < pictures; b += static_cast<int>(gridDim.z)) {
    const std::uint8_t* own = bits + std::int64_t{b} * tokens.h * tokens.w * bit_count;
    for (int first = static_cast<int>(blockIdx.y) * kN; first < channels; first += static_cast<int>(gridDim.y) * kN) {
      const auto signs = [&](int at_y, int at_x) {
        return signs_at<kN, kPatchify>(own, tokens, bit_count, first, at_y, at_x);
      };
      const std::uint32_t upper_low = signs(row.low, column.low);
      const std::uint32_t upper_high = signs(row.low, column.high);
      const std::uint32_t lower_low = signs(row.high, column.low);
      const std::uint32_t lower_high = signs(row.high, column.high);
      float* to = summed + (std::int64_t{b} * channels + first) * plane + place;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float upper = mix(code(upper_low, i), code(upper_high, i), column.weight);
        const float lower = mix(code(lower_low, i), code(lower_high, i), column.weight);
        to[i * plane] = __fadd_rn(to[i * plane], mix(upper, lower, row.weight));
      }
    }
  }
}

template <int kN, bool kPatchify>
void launch_add_codes(const std::uint8_t* bits, int pictures, Grid tokens, int bit_count, float* summed, Grid full,
                      cudaStream_t stream) {
  const int channels = kPatchify ? bit_count / 4 : bit_count;
  const auto unit = static_cast<float>(1.0 / std::sqrt(static_cast<double>(channels)));
  const dim3 grid(blocks_for(std::int64_t{full.h} * full.w, kThreads),
                  static_cast<unsigned>(std::min<std::int64_t>(channels / kN, kMaxGridYZ)),
                  static_cast<unsigned>(std::min<std::int64_t>(pictures, kMaxGridYZ)));
  add_codes_kernel<kN, kPatchify><<<grid, kThreads, 0, stream>>>(bits, pictures, tokens, bit_count, unit, summed, full);
  check_launch("add codes");
}

constexpr int kTile = 32;  // tokens and bits of a block
constexpr int kTileRows = 8;

// Neighbouring threads compute neighbouring tokens, because maps are planes, and write neighbouring bits: between the
// two a tile goes through shared memory.
template <bool kPatchify>
__global__ void __launch_bounds__(kTile* kTileRows)
    words_kernel(const float* summed, int pictures, int channels, Grid full, Grid tokens, float* words) {
  __shared__ float tile[kTile][kTile + 1];  // [bit][token]
  const int bits = kPatchify ? 4 * channels : channels;
  const std::int64_t count = std::int64_t{tokens.h} * tokens.w;
  const std::int64_t plane = std::int64_t{full.h} * full.w;
  const std::int64_t first_token = std::int64_t{blockIdx.x} * kTile;
  const std::int64_t token = first_token + threadIdx.x;
  const int token_y = static_cast<int>(token / tokens.w);
  const int token_x = static_cast<int>(token % tokens.w);
  for (int b = static_cast<int>(blockIdx.z); b < pictures; b += static_cast<int>(gridDim.z)) {
    for (int first_bit = static_cast<int>(blockIdx.y) * kTile; first_bit < bits;
         first_bit += static_cast<int>(gridDim.y) * kTile) {
#pragma unroll
      for (int j = static_cast<int>(threadIdx.y); j < kTile; j += kTileRows) {
        const int bit = first_bit + j;
        if (bit >= bits || token >= count) continue;
        const Tap row =
            kPatchify ? tap_of(2 * token_y + bit % 4 / 2, full.h, 2 * tokens.h) : tap_of(token_y, full.h, tokens.h);
        const Tap column =
            kPatchify ? tap_of(2 * token_x + bit % 2, full.w, 2 * tokens.w) : tap_of(token_x, full.w, tokens.w);
        const float* from = summed + (std::int64_t{b} * channels + (kPatchify ? bit / 4 : bit)) * plane;
        const float* upper = from + std::int64_t{row.low} * full.w;
        const float* lower = from + std::int64_t{row.high} * full.w;
        tile[j][threadIdx.x] = mix(mix(upper[column.low], upper[column.high], column.weight),
                                   mix(lower[column.low], lower[column.high], column.weight), row.weight);
      }
      __syncthreads();
      for (int j = static_cast<int>(threadIdx.y); j < kTile; j += kTileRows) {
        const int bit = first_bit + static_cast<int>(threadIdx.x);
        if (bit < bits && first_token + j < count)
          words[(std::int64_t{b} * count + first_token + j) * bits + bit] = tile[threadIdx.x][j];
      }
      __syncthreads();
    }
  }
}

void check_patchify(int bits) {
  if (bits % 4 != 0)
    throw Error(ErrorKind::usage, "bits of a patchified grid are divisible by 4, got " + std::to_string(bits));
}

}  // namespace

void fill_random(void* out, DType type, std::int64_t count, std::uint64_t seed, float deviation, cudaStream_t stream) {
  if (count <= 0) return;
  with_type(type, [&](auto element) {
    random_kernel<<<blocks_for(count, 4 * kThreads), kThreads, 0, stream>>>(static_cast<decltype(element)*>(out), count,
                                                                            seed, deviation);
  });
  check_launch("fill random");
}

void sample_bits(const float* logits, int pictures, int tokens, int bits, const std::uint64_t* sampling, int scale,
                 std::uint8_t* out, cudaStream_t stream) {
  if (pictures <= 0 || tokens <= 0 || bits <= 0) return;
  const int groups = (bits + 3) / 4;
  const std::int64_t items = std::int64_t{pictures} * tokens * groups;
  const bool vectors = bits % 4 == 0 && aligned(logits, 16) && aligned(out, 4);
  const auto kernel = vectors ? sample_kernel<true> : sample_kernel<false>;
  kernel<<<blocks_for(items, kThreads), kThreads, 0, stream>>>(logits, items, groups, tokens, bits, sampling, scale,
                                                               out);
  check_launch("sample bits");
}

void add_codes(const std::uint8_t* bits, int pictures, Grid tokens, int bit_count, bool patchify, float* summed,
               Grid full, cudaStream_t stream) {
  if (pictures <= 0 || tokens.tokens() <= 0 || bit_count <= 0 || full.tokens() <= 0) return;
  if (patchify) check_patchify(bit_count);
  const bool four = patchify ? bit_count % 16 == 0 && aligned(bits, 16) : bit_count % 4 == 0 && aligned(bits, 4);
  const auto launch = patchify ? (four ? launch_add_codes<4, true> : launch_add_codes<1, true>)
                               : (four ? launch_add_codes<4, false> : launch_add_codes<1, false>);
  launch(bits, pictures, tokens, bit_count, summed, full, stream);
}

void words_of(const float* summed, int pictures, int channels, Grid full, Grid tokens, bool patchify, float* words,
              cudaStream_t stream) {
  if (pictures <= 0 || channels <= 0 || full.tokens() <= 0 || tokens.tokens() <= 0) return;
  const std::int64_t bits = patchify ? 4 * std::int64_t{channels} : channels;
  const dim3 grid(blocks_for(tokens.tokens(), kTile),
                  static_cast<unsigned>(std::min<std::int64_t>((bits + kTile - 1) / kTile, kMaxGridYZ)),
                  static_cast<unsigned>(std::min<std::int64_t>(pictures, kMaxGridYZ)));
  const auto kernel = patchify ? words_kernel<true> : words_kernel<false>;
  kernel<<<grid, dim3(kTile, kTileRows), 0, stream>>>(summed, pictures, channels, full, tokens, words);
  check_launch("words of codes");
}

}  // namespace sparvar::cuda
