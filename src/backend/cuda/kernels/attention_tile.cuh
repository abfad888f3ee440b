// Attention in bf16 on the tensor cores of compute capability 8.0 and newer (m16n8k16), in pieces: queries of a tile
// stay in registers, keys and values pass through shared memory stage by stage, the softmax is kept up to date as they
// pass (FlashAttention-2, arXiv 2307.08691). attention.cu streams all keys, attention_lists.cu those of a list.
#pragma once

#include <type_traits>

#include "backend/cuda/kernels/mma.cuh"

namespace sparvar::cuda {

constexpr int kKeys = 64;  // of one stage
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;
constexpr float kSlack = 8;

/// Rows of kDim channels in shared memory, 16 bytes apart so that eight of them fill all banks.
template <int kDim>
struct Rows {
  static constexpr int kStride = kDim + 8;
  static constexpr int kVectors = kDim / 8;

  /// `count` rows of a matrix: row i is row_of(i) of it, or zeros where that is negative; missing channels are zeros.
  template <int kThreads, typename RowOf>
  static __device__ void copy(int count, bf16* to, const bf16* from, std::int64_t row_stride, int dim, RowOf row_of) {
    for (int i = static_cast<int>(threadIdx.x); i < count * kVectors; i += kThreads) {
      const int row = row_of(i / kVectors);
      const int channel = i % kVectors * 8;
      const bool there = row >= 0 && channel < dim;
      copy_async(shared_address(to + i / kVectors * kStride + channel), from + (there ? row * row_stride + channel : 0),
                 there);
    }
  }
};

template <int kDim, int kWarps>
struct Tile {
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStride = Rows<kDim>::kStride;
  static constexpr int kSharedBytes = (kQueries + 4 * kKeys) * kStride * 2;
};

/// The 16 rows of this warp in a tile of them, as the first matrix of products.
template <int kDim>
__device__ inline void load_rows(unsigned (&parts)[kDim / 16][4], const bf16* tile) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d)
    load_matrices(parts[d],
                  shared_address(tile + (warp * 16 + lane % 16) * Rows<kDim>::kStride + d * 16 + lane / 16 * 8));
}

/// What a thread of a warp of 16 queries keeps: rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct Running {
  float out[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // of the logits times scale and log2 e
  float sum[2] = {0, 0};                      // of this thread's columns
};

/// Those of keys that are not there are zeros, or products with what the stage holds there.
template <int kDim>
__device__ inline void logits_of(const unsigned (&q)[kDim / 16][4], const bf16* k, int keys_left,
                                 float (&s)[kKeys / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned base = shared_address(k + (lane % 8 + lane / 16 * 8) * Rows<kDim>::kStride + lane / 8 % 2 * 8);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    for (int j = 0; j < 4; ++j) s[2 * n][j] = s[2 * n + 1][j] = 0;
    if (n * 16 >= keys_left) continue;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned b[4];
      load_matrices(b, base + (n * 16 * Rows<kDim>::kStride + d * 16) * 2);
      multiply(s[2 * n], q[d], b[0], b[1]);
      multiply(s[2 * n + 1], q[d], b[2], b[3]);
    }
  }
}

/// 2^x to 2 ulp, denormal results are zero.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Logits of keys that are not there, from `keys_left` on, become no weight.
template <int kBlocks>
__device__ inline void drop_missing(float (&s)[kBlocks][4], int keys_left) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
    for (int j = 0; j < 4; ++j) s[n][j] = n * 8 + lane % 4 * 2 + j % 2 < keys_left ? s[n][j] : -INFINITY;
}

/// Logits become weights; `shrink` brings what was summed so far to the new maximum.
template <int kDim, int kBlocks>
__device__ inline void weigh(Running<kDim>& r, float (&s)[kBlocks][4], float scale, float (&shrink)[2]) {
  constexpr int kParts = 4;  // of a row, whose maxima need not wait for each other
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top[kParts];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float of_two = fmaxf(s[n][2 * half], s[n][2 * half + 1]);
      top[n % kParts] = n < kParts ? of_two : fmaxf(top[n % kParts], of_two);
    }
    float largest = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 2)) * scale;
    // What was summed keeps its scale until weights would pass 2^8: most stages then leave it alone.
    if (!(largest > r.largest[half] + kSlack)) largest = r.largest[half];
    shrink[half] = power_of_two(r.largest[half] - largest);
    r.largest[half] = largest;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        s[n][j] = power_of_two(fmaf(s[n][j], scale, -largest));
        sum += s[n][j];
      }
    r.sum[half] = r.sum[half] * shrink[half] + sum;
  }
}

template <int kDim>
__device__ inline void rescale(Running<kDim>& r, const float (&shrink)[2]) {
#pragma unroll
  for (int d = 0; d < kDim / 8; ++d)
    for (int j = 0; j < 4; ++j) r.out[d][j] *= shrink[j / 2];
}

template <int kDim>
__device__ inline void renormalise(Running<kDim>& r, float (&s)[kKeys / 8][4], float scale, int keys_left) {
  float shrink[2];
  if (keys_left < kKeys) drop_missing(s, keys_left);
  weigh(r, s, scale, shrink);
  rescale<kDim>(r, shrink);
}

/// Weights as the first matrix of products of 16 keys each.
template <int kProducts>
__device__ inline void pack_weights(unsigned (&p)[kProducts][4], const float (&s)[2 * kProducts][4]) {
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    p[n][0] = pack(s[2 * n][0], s[2 * n][1]);
    p[n][1] = pack(s[2 * n][2], s[2 * n][3]);
    p[n][2] = pack(s[2 * n + 1][0], s[2 * n + 1][1]);
    p[n][3] = pack(s[2 * n + 1][2], s[2 * n + 1][3]);
  }
}

template <int kDim>
__device__ inline void add_values(Running<kDim>& r, const float (&s)[kKeys / 8][4], const bf16* v, int keys_left) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned base = shared_address(v + (lane % 16) * Rows<kDim>::kStride + lane / 16 * 8);
  unsigned p[kKeys / 16][4];
  pack_weights(p, s);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    if (n * 16 >= keys_left) break;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned b[4];
      load_transposed(b, base + (n * 16 * Rows<kDim>::kStride + d * 16) * 2);
      multiply(r.out[2 * d], p[n], b[0], b[1]);
      multiply(r.out[2 * d + 1], p[n], b[2], b[3]);
    }
  }
}

/// Through the warp's own 16 rows of shared memory, so that memory is written 16 bytes at a time. `row_of(i)`: the
/// query that row i of them is, or -1.
template <int kDim, typename RowOf>
__device__ inline void write(const Running<kDim>& r, bf16* rows, bf16* out, std::int64_t out_row, int dim,
                             float* statistics, RowOf row_of) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();  // the queries that lay there have been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = r.sum[half];
    sum += __shfl_xor_sync(0xffffffffU, sum, 1);
    sum += __shfl_xor_sync(0xffffffffU, sum, 2);
    const float inverse = sum > 0 ? 1.0F / sum : 0.0F;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      *reinterpret_cast<unsigned*>(rows + (lane / 4 + 8 * half) * Rows<kDim>::kStride + d * 8 + lane % 4 * 2) =
          pack(r.out[d][2 * half] * inverse, r.out[d][2 * half + 1] * inverse);
    const int row = row_of(lane / 4 + 8 * half);
    if (statistics != nullptr && lane % 4 == 0 && row >= 0) {
      statistics[2 * row] = r.largest[half] * kLn2;
      statistics[2 * row + 1] = sum;
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * Rows<kDim>::kVectors; i += 32) {
    const int row = row_of(i / Rows<kDim>::kVectors);
    const int channel = i % Rows<kDim>::kVectors * 8;
    if (row >= 0 && channel < dim)
      *reinterpret_cast<uint4*>(out + row * out_row + channel) =
          *reinterpret_cast<const uint4*>(rows + i / Rows<kDim>::kVectors * Rows<kDim>::kStride + channel);
  }
}

/// Calls f with the head dimension that the kernels are made for, the smallest that `dim` fits, as a constant.
template <typename F>
void with_head_dim(int dim, F f) {
  if (dim % 8 != 0 || dim < 8 || dim > 128)
    throw Error(ErrorKind::usage, "attention in bf16 takes heads of a multiple of 8 channels, 128 at most");
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 80) return f(std::integral_constant<int, 80>{});
  if (dim <= 96) return f(std::integral_constant<int, 96>{});
  if (dim <= 112) return f(std::integral_constant<int, 112>{});
  f(std::integral_constant<int, 128>{});
}

}  // namespace sparvar::cuda
