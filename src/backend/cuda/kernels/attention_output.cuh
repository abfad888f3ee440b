// What attention_hopper.cu writes: a tile's output with its statistics, and logits.
#pragma once

#include "backend/cuda/kernels/attention_tile.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/resize.cuh"

namespace sparvar::cuda {

/// Four lanes hold two channels each of four blocks of eight: afterwards each holds the eight channels of one block,
/// its lane's.
__device__ inline uint4 whole_block(const unsigned (&x)[4]) {
  const int lane = static_cast<int>(threadIdx.x);
  const bool upper = (lane & 2) != 0;
  const bool odd = (lane & 1) != 0;
  const unsigned far0 = __shfl_xor_sync(0xffffffffU, upper ? x[0] : x[2], 2);
  const unsigned far1 = __shfl_xor_sync(0xffffffffU, upper ? x[1] : x[3], 2);
  const unsigned own0 = upper ? x[2] : x[0];
  const unsigned own1 = upper ? x[3] : x[1];
  // Of blocks 2 (lane / 2) and the next: the words of the lanes below, and above, the middle of the four.
  const unsigned low0 = upper ? far0 : own0, high0 = upper ? own0 : far0;
  const unsigned low1 = upper ? far1 : own1, high1 = upper ? own1 : far1;
  const unsigned low_far = __shfl_xor_sync(0xffffffffU, odd ? low0 : low1, 1);
  const unsigned high_far = __shfl_xor_sync(0xffffffffU, odd ? high0 : high1, 1);
  const unsigned low_own = odd ? low1 : low0;
  const unsigned high_own = odd ? high1 : high0;
  return odd ? make_uint4(low_far, low_own, high_far, high_own) : make_uint4(low_own, low_far, high_own, high_far);
}

/// What is added to one query's output: rows of the cache and their weights.
struct AddedRow {
  const bf16* cache;  // of the picture; null: nothing is added
  int at[4];
  float weight[4];

  __device__ AddedRow(const ListAttention& a, int batch, int head, int query, int dim)
      : cache(static_cast<const bf16*>(a.residual.cache)), at(), weight() {
    if (cache == nullptr) return;
    const Grid from = a.residual.from, to = a.residual.to;
    const Corners corners(static_cast<int>(query / to.w), static_cast<int>(query % to.w), from, to,
                          [from](int row, int column) { return row * from.w + column; });
    cache += std::int64_t{batch} * a.residual.from.h * a.residual.from.w * a.heads * dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = corners.weight[i];
      at[i] = (corners.token[i] * a.heads + head) * dim;
    }
  }
  /// Words of two channels each, from `channel` on.
  template <typename Words>
  __device__ Words add(Words words, int channel) const {
    constexpr int kCount = sizeof(Words) / 4;
    const auto of = [&](int corner) { return *reinterpret_cast<const Words*>(cache + at[corner] + channel); };
    const Words a = of(0), b = of(1), c = of(2), d = of(3);
    const auto pair = [](const Words& x, int i) {
      return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&x)[i]);
    };
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float2 x = pair(words, i), pa = pair(a, i), pb = pair(b, i), pc = pair(c, i), pd = pair(d, i);
      reinterpret_cast<unsigned*>(&words)[i] =
          pack(plus_corners(x.x, weight, pa.x, pb.x, pc.x, pd.x), plus_corners(x.y, weight, pa.y, pb.y, pc.y, pd.y));
    }
    return words;
  }
};

/// One query's output, of the four lanes that hold it together; not `there`: nothing is written.
template <int kDim>
__device__ inline void write_row(const float (&out)[kDim / 8][4], int half, float inverse, bf16* to, bool there,
                                 const AddedRow& added) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int d = 0; d < kDim / 32; ++d) {
    unsigned words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      words[j] = pack(out[4 * d + j][2 * half] * inverse, out[4 * d + j][2 * half + 1] * inverse);
    uint4 block = whole_block(words);
    const int channel = (4 * d + lane) * 8;
    if (added.cache != nullptr && there) block = added.add(block, channel);
    if (there) *reinterpret_cast<uint4*>(to + channel) = block;
  }
#pragma unroll
  for (int d = kDim / 32 * 4; d < kDim / 8; ++d)
    if (there) {
      const int channel = d * 8 + lane * 2;
      const unsigned word = pack(out[d][2 * half] * inverse, out[d][2 * half + 1] * inverse);
      *reinterpret_cast<unsigned*>(to + channel) = added.cache != nullptr ? added.add(word, channel) : word;
    }
}

template <int kDim>
__device__ inline void write_tile(const ListAttention& a, const Running<kDim>& r, int index, const TileRows& tile,
                                  int first_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int batch = index / a.heads;
  const int head = index - batch * a.heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = r.sum[half];
    sum += __shfl_xor_sync(0xffffffffU, sum, 1);
    sum += __shfl_xor_sync(0xffffffffU, sum, 2);
    const int row = first_row + lane / 4 + 8 * half;
    const bool there = row < tile.queries;
    const int place = tile.first_query + row;
    const std::int64_t query = there ? (a.in_order ? place : __ldg(a.rows + place)) + tile.shift : 0;
    bf16* const to =
        static_cast<bf16*>(a.out) + ((std::int64_t{batch} * a.out_queries + query) * a.heads + head) * kDim;
    write_row<kDim>(r.out, half, sum > 0 ? 1.0F / sum : 0.0F, to, there,
                    AddedRow(a, batch, head, static_cast<int>(query), kDim));
    if (a.statistics != nullptr && lane % 4 == 0 && there) {
      float* const statistics = a.statistics + (index * std::int64_t{a.out_queries} + query) * 2;
      statistics[0] = r.largest[half] * kLn2;
      statistics[1] = sum;
    }
  }
}

/// Writes the logits of the 64 keys from `place` on, of which `left` are there. `rows`: of the logits, negative where a
/// thread's row is not there.
__device__ inline void write_logits(const ListAttention& a, const float (&s)[kKeys / 8][4], const int (&rows)[2],
                                    std::int64_t place, int left) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t at = max(rows[half], 0) * a.logits.stride + place;
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // of the keys
      float x[LogitRows::kGroup];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < LogitRows::kGroup; ++i) {
        const int block = 4 * part + i / 2;
        x[i] = block * 8 + 2 * lane + i % 2 < left ? fmaf(s[block][2 * half + i % 2], a.scale, 0.0F) : NAN;
        largest = i == 0 ? x[0] : fmaxf(largest, x[i]);
      }
      if (rows[half] >= 0) {
        auto* const to = reinterpret_cast<float4*>(a.logits.logits + at + 32 * part + 8 * lane);
        __stcs(to, make_float4(x[0], x[1], x[2], x[3]));
        __stcs(to + 1, make_float4(x[4], x[5], x[6], x[7]));
        a.logits.largest[at / LogitRows::kGroup + 4 * part + lane] = largest;
      }
    }
  }
}

}  // namespace sparvar::cuda
