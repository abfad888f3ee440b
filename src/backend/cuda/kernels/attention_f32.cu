// Attention in f32, for the f32 mode and for texts: plain multiply-adds, no tensor cores, heads of up to 256 channels.
#include <algorithm>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kTile = 32;    // queries of a block, and keys of a stage
constexpr int kSharers = 4;  // threads of one query
constexpr int kThreads = kTile * kSharers;
constexpr int kWidest = 256;
constexpr int kSumDepth = 16;  // products summed by themselves first: long chains of f32 lose digits

/// Rows [first, first + kTile) to shared memory, `stride` floats apart; missing ones become zeros.
__device__ inline void copy_rows(float* to, int stride, const float* from, std::int64_t row_stride, int first, int end,
                                 int dim) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * dim; i += kThreads) {
    const int row = i / dim;
    const int d = i % dim;
    to[row * stride + d] = first + row < end ? from[(first + row) * row_stride + d] : 0.0F;
  }
}

__device__ inline float sharers_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}
__device__ inline float sharers_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

// Thread t serves query t / 4: keys and channels t % 4, t % 4 + 4, ...
template <int kChannels>  // of a thread, at most
__global__ void __launch_bounds__(kThreads) attend(const DenseAttention a) {
  extern __shared__ float memory[];
  const int stride = a.dim + 1;
  float* const q_rows = memory;
  float* const k_rows = q_rows + kTile * stride;
  float* const v_rows = k_rows + kTile * stride;
  float* const weights = v_rows + kTile * stride;  // [kTile][kTile + 1]
  const int head = static_cast<int>(blockIdx.y) % a.heads;
  const int batch = static_cast<int>(blockIdx.y) / a.heads;
  const int first_query = static_cast<int>(blockIdx.x) * kTile;
  const int first_key = a.cu_lengths != nullptr ? a.cu_lengths[batch] : 0;
  const int keys = a.cu_lengths != nullptr ? a.cu_lengths[batch + 1] - first_key : a.keys;
  const std::int64_t kv = batch * a.k_batch + head * a.k_head + first_key * a.k_row;
  const int row = static_cast<int>(threadIdx.x) / kSharers;
  const int part = static_cast<int>(threadIdx.x) % kSharers;
  copy_rows(q_rows, stride, static_cast<const float*>(a.q) + batch * a.q_batch + head * a.q_head, a.q_row, first_query,
            a.queries, a.dim);

  float out[kChannels] = {};
  float largest = -INFINITY;
  float sum = 0;
  for (int first = 0; first < keys; first += kTile) {
    __syncthreads();
    copy_rows(k_rows, stride, static_cast<const float*>(a.k) + kv, a.k_row, first, keys, a.dim);
    copy_rows(v_rows, stride, static_cast<const float*>(a.v) + kv, a.k_row, first, keys, a.dim);
    __syncthreads();
    float s[kTile / kSharers] = {};
    for (int begin = 0; begin < a.dim; begin += kSumDepth) {
      float part_sum[kTile / kSharers] = {};
      for (int d = begin; d < min(begin + kSumDepth, a.dim); ++d) {
        const float x = q_rows[row * stride + d];
#pragma unroll
        for (int j = 0; j < kTile / kSharers; ++j)
          part_sum[j] = fmaf(x, k_rows[(j * kSharers + part) * stride + d], part_sum[j]);
      }
#pragma unroll
      for (int j = 0; j < kTile / kSharers; ++j) s[j] += part_sum[j];
    }
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTile / kSharers; ++j) {
      s[j] = first + j * kSharers + part < keys ? s[j] * a.scale : -INFINITY;
      top = fmaxf(top, s[j]);
    }
    const float now = fmaxf(largest, sharers_max(top));
    const float shrink = expf(largest - now);
    largest = now;
    float stage_sum = 0;  // sums of a stage come first: the error grows with stages, not with keys
#pragma unroll
    for (int j = 0; j < kTile / kSharers; ++j) {
      const float weight = expf(s[j] - now);
      stage_sum += weight;
      weights[row * (kTile + 1) + j * kSharers + part] = weight;
    }
    sum = fmaf(sum, shrink, stage_sum);
    __syncwarp();  // the sharers of a query are in one warp
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int d = c * kSharers + part;
      if (d >= a.dim) break;
      float x = 0;
      for (int j = 0; j < kTile; ++j) x = fmaf(weights[row * (kTile + 1) + j], v_rows[j * stride + d], x);
      out[c] = fmaf(out[c], shrink, x);
    }
  }
  sum = sharers_sum(sum);
  const int query = first_query + row;
  if (query >= a.queries) return;
  float* to = static_cast<float*>(a.out) + batch * a.out_batch + head * a.out_head + query * a.out_row;
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c * kSharers + part < a.dim) to[c * kSharers + part] = sum > 0 ? out[c] / sum : 0.0F;
  if (a.statistics != nullptr && part == 0) {
    float* statistics = a.statistics + ((std::int64_t{batch} * a.heads + head) * a.queries + query) * 2;
    statistics[0] = largest;
    statistics[1] = sum;
  }
}

template <int kChannels>
void launch(const DenseAttention& args, cudaStream_t stream) {
  const int bytes = (3 * kTile * (args.dim + 1) + kTile * (kTile + 1)) * 4;
  constexpr int kMost = (3 * kTile * (kChannels * kSharers + 1) + kTile * (kTile + 1)) * 4;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(attend<kChannels>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  (void)allowed;  // a refusal shows at the launch
  const dim3 grid(blocks_for(args.queries, kTile), static_cast<unsigned>(args.batch * args.heads));
  attend<kChannels><<<grid, kThreads, bytes, stream>>>(args);
  check_launch("attention in f32");
}

/// One query of one head to a warp: a pass for the largest logit, one for the sums. For comparing with references.
__global__ void __launch_bounds__(128) attend_lists(const ListAttention a) {
  extern __shared__ float memory[];  // a query to each warp
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto index = static_cast<int>(blockIdx.y);
  const TileRows tile = a.tiles[blockIdx.x];
  const KeyRange range = a.ranges[(a.own_lists ? index * a.list_tiles : 0) + tile.list];
  const float* k = static_cast<const float*>(a.k) + index * a.capacity * a.dim;
  const float* v = static_cast<const float*>(a.v) + index * a.capacity * a.dim;
  float* const query = memory + warp * a.dim;
  const auto logit = [&](int i) {
    const float* key = k + std::int64_t{a.keys[range.first + i]} * a.dim;
    float x = 0;
    for (int d = 0; d < a.dim; ++d) x = fmaf(query[d], key[d], x);
    return x * a.scale;
  };
  for (int i = warp; i < tile.queries; i += 4) {
    const int row = a.rows[tile.first_query + i];
    const std::int64_t from = (index * std::int64_t{a.queries} + row) * a.dim;
    __syncwarp();
    for (int d = lane; d < a.dim; d += 32) query[d] = static_cast<const float*>(a.q)[from + d];
    __syncwarp();
    float largest = -INFINITY;
    for (int key = lane; key < range.keys; key += 32) largest = fmaxf(largest, logit(key));
    largest = warp_max(largest);
    float sum = 0;
    float out[kWidest / 32] = {};
    for (int first = 0; first < range.keys; first += 32) {
      const float weight = first + lane < range.keys ? expf(logit(first + lane) - largest) : 0.0F;
      sum += weight;
      for (int j = 0; j < min(32, range.keys - first); ++j) {
        const float w = __shfl_sync(0xffffffffU, weight, j);
        const float* value = v + std::int64_t{a.keys[range.first + first + j]} * a.dim;
#pragma unroll
        for (int c = 0; c < kWidest / 32; ++c)
          if (c * 32 + lane < a.dim) out[c] = fmaf(w, value[c * 32 + lane], out[c]);
      }
    }
    sum = warp_sum(sum);
    float* to =
        static_cast<float*>(a.out) +
        ((index / a.heads * std::int64_t{a.out_queries} + row + tile.shift) * a.heads + index % a.heads) * a.dim;
#pragma unroll
    for (int c = 0; c < kWidest / 32; ++c)
      if (c * 32 + lane < a.dim) to[c * 32 + lane] = sum > 0 ? out[c] / sum : 0.0F;
    if (a.statistics != nullptr && lane == 0) {
      float* statistics = a.statistics + (index * std::int64_t{a.out_queries} + row + tile.shift) * 2;
      statistics[0] = largest;
      statistics[1] = sum;
    }
  }
}

constexpr int kTextThreads = 128;

/// One query of one head: logits of all keys, softmax, sum of values.
__global__ void __launch_bounds__(kTextThreads)
    attend_text(const float* q, const float* k, const float* v, const float* bias, const std::int32_t* length,
                int tokens, int heads, int dim, float* out) {
  extern __shared__ float memory[];  // [tokens] weights, [dim] query
  __shared__ float parts[kTextThreads / 32];
  float* const query = memory + tokens;
  const int t = static_cast<int>(blockIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int keys = min(max(*length, 0), tokens);
  const std::int64_t row = (std::int64_t{t} * heads + h) * dim;
  for (int d = thread; d < dim; d += kTextThreads) query[d] = q[row + d];
  __syncthreads();
  float top = -INFINITY;
  for (int key = warp; key < keys; key += kTextThreads / 32) {
    float x = 0;
    for (int d = lane; d < dim; d += 32) x = fmaf(query[d], k[(std::int64_t{key} * heads + h) * dim + d], x);
    x = warp_sum(x) + bias[(std::int64_t{h} * tokens + t) * tokens + key];
    if (lane == 0) memory[key] = x;
    top = fmaxf(top, x);
  }
  if (lane == 0) parts[warp] = top;
  __syncthreads();
  for (const float part : parts) top = fmaxf(top, part);
  __syncthreads();
  float sum = 0;
  for (int key = thread; key < keys; key += kTextThreads) sum += memory[key] = expf(memory[key] - top);
  sum = warp_sum(sum);
  if (lane == 0) parts[warp] = sum;
  __syncthreads();
  sum = 0;
  for (const float part : parts) sum += part;
  for (int d = thread; d < dim; d += kTextThreads) {
    float x = 0;
    for (int key = 0; key < keys; ++key) x = fmaf(memory[key], v[(std::int64_t{key} * heads + h) * dim + d], x);
    out[row + d] = keys > 0 ? x / sum : 0.0F;
  }
}

}  // namespace

void dense_attention_f32(const DenseAttention& args, cudaStream_t stream) {
  if (args.dim < 1 || args.dim > kWidest || args.batch * args.heads > 65535)
    throw Error(ErrorKind::usage, "attention in f32 takes heads of 1 to 256 channels");
  if (args.dim <= 128)
    launch<32>(args, stream);
  else
    launch<64>(args, stream);
}

void list_attention_f32(const ListAttention& args, cudaStream_t stream) {
  if (args.dim < 1 || args.dim > kWidest)
    throw Error(ErrorKind::usage, "attention in f32 takes heads of 1 to 256 channels");
  const dim3 grid(static_cast<unsigned>(args.tile_count), static_cast<unsigned>(args.batch * args.heads));
  attend_lists<<<grid, 128, static_cast<std::size_t>(args.dim) * 4 * sizeof(float), stream>>>(args);
  check_launch("attention of lists in f32");
}

void biased_attention(const float* q, const float* k, const float* v, const float* bias, const std::int32_t* length,
                      int tokens, int heads, int dim, float* out, cudaStream_t stream) {
  if (tokens <= 0 || heads <= 0 || dim <= 0) return;
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(heads));
  attend_text<<<grid, kTextThreads, static_cast<std::size_t>(tokens + dim) * 4, stream>>>(q, k, v, bias, length, tokens,
                                                                                          heads, dim, out);
  check_launch("attention over a text");
}

}  // namespace sparvar::cuda
