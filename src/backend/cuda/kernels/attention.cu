// Dense attention in bf16: queries of one tile stay in registers, keys and values stream through shared memory in two
// stages, the softmax is kept up to date as they pass (FlashAttention-2, arXiv 2307.08691). Matrix products are
// m16n8k16 of the tensor cores of compute capability 8.0 and newer.
#include <algorithm>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {

void dense_attention_f32(const DenseAttention& args, cudaStream_t stream);

namespace {

constexpr int kKeys = 64;  // of one stage
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ inline void load_matrices(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
__device__ inline void load_transposed(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// 16 bytes to shared memory, zeros where there is no source.
__device__ inline void copy_async(unsigned to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}
__device__ inline unsigned pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

/// Rows of kDim channels in shared memory, 16 bytes apart so that eight of them fill all banks.
template <int kDim>
struct Rows {
  static constexpr int kStride = kDim + 8;
  static constexpr int kVectors = kDim / 8;

  /// Rows [first, first + kCount) of a matrix; missing rows and channels become zeros.
  template <int kCount, int kThreads>
  static __device__ void copy(bf16* to, const bf16* from, std::int64_t row_stride, int first, int end, int dim) {
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kVectors; i += kThreads) {
      const int row = i / kVectors;
      const int channel = i % kVectors * 8;
      const bool there = first + row < end && channel < dim;
      copy_async(shared_address(to + row * kStride + channel),
                 from + (there ? (first + row) * row_stride + channel : 0), there);
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

/// What a thread of a warp of 16 queries keeps: rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct Running {
  float out[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // of the logits times scale and log2 e
  float sum[2] = {0, 0};                      // of this thread's columns
};

template <int kDim>
__device__ inline void logits_of(const unsigned (&q)[kDim / 16][4], const bf16* k, float (&s)[kKeys / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned base = shared_address(k + (lane % 8 + lane / 16 * 8) * Rows<kDim>::kStride + lane / 8 % 2 * 8);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    for (int j = 0; j < 4; ++j) s[2 * n][j] = s[2 * n + 1][j] = 0;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned b[4];
      load_matrices(b, base + (n * 16 * Rows<kDim>::kStride + d * 16) * 2);
      multiply(s[2 * n], q[d], b[0], b[1]);
      multiply(s[2 * n + 1], q[d], b[2], b[3]);
    }
  }
}

/// Logits become weights; what was summed so far is brought to the new maximum.
template <int kDim>
__device__ inline void renormalise(Running<kDim>& r, float (&s)[kKeys / 8][4], float scale, int keys_left) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (keys_left < kKeys)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int j = 0; j < 4; ++j)
        if (n * 8 + lane % 4 * 2 + j % 2 >= keys_left) s[n][j] = -INFINITY;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, 2));
    const float largest = fmaxf(r.largest[half], top * scale);
    const float shrink = exp2f(r.largest[half] - largest);
    r.largest[half] = largest;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        s[n][j] = exp2f(fmaf(s[n][j], scale, -largest));
        sum += s[n][j];
      }
    r.sum[half] = r.sum[half] * shrink + sum;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      r.out[d][2 * half] *= shrink;
      r.out[d][2 * half + 1] *= shrink;
    }
  }
}

template <int kDim>
__device__ inline void add_values(Running<kDim>& r, const float (&s)[kKeys / 8][4], const bf16* v) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned base = shared_address(v + (lane % 16) * Rows<kDim>::kStride + lane / 16 * 8);
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    const unsigned p[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]),
                           pack(s[2 * n + 1][0], s[2 * n + 1][1]), pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned b[4];
      load_transposed(b, base + (n * 16 * Rows<kDim>::kStride + d * 16) * 2);
      multiply(r.out[2 * d], p, b[0], b[1]);
      multiply(r.out[2 * d + 1], p, b[2], b[3]);
    }
  }
}

/// Through the warp's own rows of shared memory, so that memory is written 16 bytes at a time.
template <int kDim>
__device__ inline void write(const Running<kDim>& r, const DenseAttention& a, int batch, int head, int first_row,
                             bf16* rows) {
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
    const int row = first_row + lane / 4 + 8 * half;
    if (a.statistics != nullptr && lane % 4 == 0 && row < a.queries) {
      float* to = a.statistics + ((std::int64_t{batch} * a.heads + head) * a.queries + row) * 2;
      to[0] = r.largest[half] * kLn2;
      to[1] = sum;
    }
  }
  __syncwarp();
  bf16* out = static_cast<bf16*>(a.out) + batch * a.out_batch + head * a.out_head;
  for (int i = lane; i < 16 * Rows<kDim>::kVectors; i += 32) {
    const int row = i / Rows<kDim>::kVectors;
    const int channel = i % Rows<kDim>::kVectors * 8;
    if (first_row + row < a.queries && channel < a.dim)
      *reinterpret_cast<uint4*>(out + (first_row + row) * a.out_row + channel) =
          *reinterpret_cast<const uint4*>(rows + row * Rows<kDim>::kStride + channel);
  }
}

/// kOneStage: all keys fit one stage (texts); a block then needs so little that four share a multiprocessor.
template <int kDim, int kWarps, bool kOneStage>
__global__ void __launch_bounds__((Tile<kDim, kWarps>::kThreads), kOneStage ? 4 : 1) attend(const DenseAttention a) {
  using T = Tile<kDim, kWarps>;
  extern __shared__ __align__(128) unsigned char memory[];
  let_next_start();
  wait_for_earlier();
  auto* const q_rows = reinterpret_cast<bf16*>(memory);
  // k and v of a stage, then of the other one, which is not there where one holds all keys.
  bf16* const k_rows = q_rows + T::kQueries * T::kStride;
  bf16* const v_rows = k_rows + kKeys * T::kStride;
  const int head = static_cast<int>(blockIdx.y) % a.heads;
  const int batch = static_cast<int>(blockIdx.y) / a.heads;
  const int first_query = static_cast<int>(blockIdx.x) * T::kQueries;
  const int first_key = a.cu_lengths != nullptr ? a.cu_lengths[batch] : 0;
  const int keys = a.cu_lengths != nullptr ? a.cu_lengths[batch + 1] - first_key : a.keys;
  const bf16* q = static_cast<const bf16*>(a.q) + batch * a.q_batch + head * a.q_head;
  const std::int64_t kv = batch * a.k_batch + head * a.k_head + first_key * a.k_row;
  const bf16* k = static_cast<const bf16*>(a.k) + kv;
  const bf16* v = static_cast<const bf16*>(a.v) + kv;
  const auto load_stage = [&](int stage) {
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    Rows<kDim>::template copy<kKeys, T::kThreads>(k_rows + buffer, k, a.k_row, stage * kKeys, keys, a.dim);
    Rows<kDim>::template copy<kKeys, T::kThreads>(v_rows + buffer, v, a.k_row, stage * kKeys, keys, a.dim);
  };

  const int stages = (keys + kKeys - 1) / kKeys;
  Rows<kDim>::template copy<T::kQueries, T::kThreads>(q_rows, q, a.q_row, first_query, a.queries, a.dim);
  if (stages > 0) load_stage(0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned q_parts[kDim / 16][4];
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d)
    load_matrices(q_parts[d], shared_address(q_rows + (warp * 16 + lane % 16) * T::kStride + d * 16 + lane / 16 * 8));

  Running<kDim> running;
  const auto attend_stage = [&](int stage) {
    const int buffer = stage % 2 * 2 * kKeys * T::kStride;
    float s[kKeys / 8][4];
    logits_of<kDim>(q_parts, k_rows + buffer, s);
    renormalise<kDim>(running, s, a.scale * kLog2E, keys - stage * kKeys);
    add_values<kDim>(running, s, v_rows + buffer);
  };
  if constexpr (kOneStage) {
    if (stages > 0) attend_stage(0);
  } else {
    for (int stage = 0; stage < stages; ++stage) {
      if (stage > 0) {
        wait_copies<0>();
        __syncthreads();  // everybody has left the buffer that is written next
      }
      if (stage + 1 < stages) load_stage(stage + 1);
      commit_copies();
      attend_stage(stage);
    }
  }
  write<kDim>(running, a, batch, head, first_query + warp * 16, q_rows + warp * 16 * T::kStride);
}

template <int kDim, int kWarps, bool kOneStage>
void launch(const DenseAttention& args, cudaStream_t stream) {
  using T = Tile<kDim, kWarps>;
  constexpr int kShared = kOneStage ? T::kSharedBytes - 2 * kKeys * T::kStride * 2 : T::kSharedBytes;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(attend<kDim, kWarps, kOneStage>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  (void)allowed;  // a refusal shows at the launch
  const dim3 grid(blocks_for(args.queries, T::kQueries), static_cast<unsigned>(args.batch * args.heads));
  launch_early(attend<kDim, kWarps, kOneStage>, grid, T::kThreads, kShared, stream, 1, args);
  check_launch("attention");
}

template <int kDim>
void launch(const DenseAttention& args, cudaStream_t stream) {
  constexpr int kEnoughBlocks = 264;
  if (args.most_keys > 0 && args.most_keys <= kKeys)
    launch<kDim, 4, true>(args, stream);
  else if (static_cast<std::int64_t>(blocks_for(args.queries, 128)) * args.batch * args.heads >= kEnoughBlocks)
    launch<kDim, 8, false>(args, stream);
  else
    launch<kDim, 4, false>(args, stream);
}

}  // namespace

void dense_attention(const DenseAttention& args, cudaStream_t stream) {
  if (args.queries <= 0 || args.batch * args.heads <= 0) return;
  if (args.type == DType::f32) return dense_attention_f32(args, stream);
  if (args.dim % 8 != 0 || args.dim < 8 || args.dim > 128 || args.batch * args.heads > 65535)
    throw Error(ErrorKind::usage, "attention in bf16 takes heads of a multiple of 8 channels, 128 at most");
  if (args.dim <= 64)
    launch<64>(args, stream);
  else if (args.dim <= 80)
    launch<80>(args, stream);
  else if (args.dim <= 96)
    launch<96>(args, stream);
  else if (args.dim <= 112)
    launch<112>(args, stream);
  else
    launch<128>(args, stream);
}

}  // namespace sparvar::cuda
