// Splits the product of the qkv projection into queries and the rows of the key and value caches; grows caches.
#include <algorithm>
#include <string>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLargestDim = 256;
constexpr unsigned kMaxGridYZ = 65535;

/// N neighbouring values: one load or store of up to 16 bytes, or two of them.
template <int kN>
__device__ inline void load(const float* from, float (&x)[kN]) {
  if constexpr (kN == 8) {
    const float4 low = __ldcs(reinterpret_cast<const float4*>(from));
    const float4 high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    const float2 pair = __ldcs(reinterpret_cast<const float2*>(from));
    x[0] = pair.x, x[1] = pair.y;
  }
}
__device__ inline void widen(unsigned pair, float* x) {
  x[0] = __uint_as_float(pair << 16);
  x[1] = __uint_as_float(pair & 0xffff0000U);
}
template <int kN>
__device__ inline void load(const bf16* from, float (&x)[kN]) {
  if constexpr (kN == 8) {
    const uint4 eight = __ldcs(reinterpret_cast<const uint4*>(from));
    widen(eight.x, x), widen(eight.y, x + 2), widen(eight.z, x + 4), widen(eight.w, x + 6);
  } else {
    widen(__ldcs(reinterpret_cast<const unsigned*>(from)), x);
  }
}
template <int kN>
__device__ inline void load_rope(const float* from, float (&x)[kN]) {
  if constexpr (kN == 8) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    x[0] = __ldg(from), x[1] = __ldg(from + 1);
  }
}
template <int kN>
__device__ inline void store(float* to, const float (&x)[kN]) {
  if constexpr (kN == 8) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  }
}
__device__ inline unsigned narrow(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <int kN>
__device__ inline void store(bf16* to, const float (&x)[kN]) {
  if constexpr (kN == 8)
    *reinterpret_cast<uint4*>(to) =
        make_uint4(narrow(x[0], x[1]), narrow(x[2], x[3]), narrow(x[4], x[5]), narrow(x[6], x[7]));
  else
    *reinterpret_cast<unsigned*>(to) = narrow(x[0], x[1]);
}

/// One head of one token, spread over kLanes lanes: chunk c of kN values of lane l begins at (c * kLanes + l) * kN.
template <int kN, int kChunks, int kLanes>
struct HeadRow {
  float at[kChunks][kN] = {};

  __device__ static int place(int chunk) { return (chunk * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kN; }
  template <typename T>
  __device__ void read(const T* from, int dim) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (place(c) < dim) load(from + place(c), at[c]);
  }
  __device__ void read_rope(const float* from, int dim) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (place(c) < dim) load_rope(from + place(c), at[c]);
  }
  template <typename T>
  __device__ void write(T* to, int dim) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (place(c) < dim) store(to + place(c), at[c]);
  }
  /// 1 / max(length, 1e-12), as torch's F.normalize; all lanes of the warp take part.
  __device__ float inverse_length() const {
    float sum = 0.0F;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      for (int i = 0; i < kN; ++i) sum += at[c][i] * at[c][i];
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    return 1.0F / fmaxf(sqrtf(sum), 1e-12F);
  }
  __device__ void multiply(float factor) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      for (int i = 0; i < kN; ++i) at[c][i] *= factor;
  }
  __device__ void rotate(const HeadRow& rope) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      for (int i = 0; i < kN; i += 2) {
        const float a = at[c][i];
        const float b = at[c][i + 1];
        at[c][i] = rope.at[c][i] * a - rope.at[c][i + 1] * b;
        at[c][i + 1] = rope.at[c][i + 1] * a + rope.at[c][i] * b;
      }
  }
};

// Heads are the fastest axis of the work, as in qkv: neighbouring groups of lanes read neighbouring memory and share a
// row of the rope table.
template <typename Row, int kLanes, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) split_kernel(const SplitQkv args) {
  let_next_start();
  const unsigned item = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const unsigned heads = static_cast<unsigned>(args.heads);
  const bool real = item < static_cast<unsigned>(args.n) * heads;  // the others stay for the shuffles
  const int dim = real ? args.dim : 0;
  const std::int64_t h = item % heads;
  const std::int64_t i = item / heads;
  if (!args.settled) wait_for_earlier();
  const float head_scale = real && args.head_scale != nullptr ? args.head_scale[h] : 1.0F;
  wait_for_earlier();
  Row rope;
  if (args.rope != nullptr) rope.read_rope(args.rope + i * dim, dim);
  for (int b = static_cast<int>(blockIdx.y); b < args.batch; b += static_cast<int>(gridDim.y)) {
    const std::int64_t stride = std::int64_t{args.heads} * dim;
    const In* source = static_cast<const In*>(args.qkv) + (std::int64_t{b} * args.n + i) * 3 * stride + h * dim;
    Row q, k, v;
    q.read(source, dim);
    k.read(source + stride, dim);
    v.read(source + 2 * stride, dim);
    const float q_factor = args.l2_norm ? q.inverse_length() : 1.0F;
    q.multiply(q_factor * head_scale);
    if (args.l2_norm) k.multiply(k.inverse_length());
    if (args.rope != nullptr) {
      q.rotate(rope);
      k.rotate(rope);
    }
    const std::int64_t head = std::int64_t{b} * args.heads + h;
    const std::int64_t cache = (head * args.capacity + args.offset + i) * dim;
    q.write(static_cast<Out*>(args.q) + (head * args.n + i) * dim, dim);
    k.write(static_cast<Out*>(args.k) + cache, dim);
    v.write(static_cast<Out*>(args.v) + cache, dim);
  }
}

template <int kN, int kChunks, int kLanes>
void launch_split(const SplitQkv& args, cudaStream_t stream) {
  const std::int64_t items = std::int64_t{args.n} * args.heads;
  const dim3 grid(blocks_for(items, kThreads / kLanes), std::min(static_cast<unsigned>(args.batch), kMaxGridYZ));
  with_type(args.qkv_type, [&](auto in) {
    with_type(args.out_type, [&](auto out) {
      launch_early(split_kernel<HeadRow<kN, kChunks, kLanes>, kLanes, decltype(in), decltype(out)>, grid, kThreads, 0,
                   stream, 1, args);
    });
  });
  check_launch("split qkv");
}

bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

template <typename Unit>
__global__ void __launch_bounds__(256)
    copy_kernel(const Unit* from, std::int64_t from_units, Unit* to, std::int64_t to_units, std::int64_t heads) {
  constexpr int kPerThread = 4;
  const std::int64_t first = std::int64_t{blockIdx.x} * 256 * kPerThread + threadIdx.x;
  for (std::int64_t head = blockIdx.y; head < heads; head += gridDim.y) {
    Unit held[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first + i * 256 < from_units) held[i] = from[head * from_units + first + i * 256];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (first + i * 256 < from_units) to[head * to_units + first + i * 256] = held[i];
  }
}

template <typename Unit>
void launch_copy(const void* from, std::int64_t from_bytes, void* to, std::int64_t to_bytes, std::int64_t heads,
                 cudaStream_t stream) {
  constexpr std::int64_t unit = sizeof(Unit);
  const dim3 grid(blocks_for(from_bytes / unit, 1024),
                  static_cast<unsigned>(std::min<std::int64_t>(heads, kMaxGridYZ)));
  copy_kernel<<<grid, 256, 0, stream>>>(static_cast<const Unit*>(from), from_bytes / unit, static_cast<Unit*>(to),
                                        to_bytes / unit, heads);
  check_launch("copy into larger");
}

}  // namespace

void split_qkv(const SplitQkv& args, cudaStream_t stream) {
  if (args.batch <= 0 || args.n <= 0 || args.heads <= 0 || args.dim <= 0) return;
  if (args.dim % 2 != 0 || args.dim > kLargestDim || std::int64_t{args.n} * args.heads >= std::int64_t{1} << 31)
    throw Error(ErrorKind::usage, "CUDA qkv: heads of " + std::to_string(args.dim) + " channels, even numbers up to " +
                                      std::to_string(kLargestDim) + " are supported");
  const bool vectors = args.dim % 8 == 0 && aligned(args.qkv, 16) && aligned(args.rope, 16) && aligned(args.q, 16) &&
                       aligned(args.k, 16) && aligned(args.v, 16);
  if (!vectors) return launch_split<2, 4, 32>(args, stream);
  if (args.dim <= 64) return launch_split<8, 1, 8>(args, stream);
  if (args.dim <= 128) return launch_split<8, 1, 16>(args, stream);
  launch_split<8, 1, 32>(args, stream);
}

void copy_into_larger(const void* from, std::int64_t from_rows, void* to, std::int64_t to_rows, std::int64_t heads,
                      std::int64_t row_bytes, cudaStream_t stream) {
  if (from_rows <= 0 || heads <= 0 || row_bytes <= 0) return;
  const std::int64_t from_bytes = from_rows * row_bytes;
  const std::int64_t to_bytes = to_rows * row_bytes;
  const auto fits = [&](std::int64_t bytes) {
    const auto size = static_cast<std::uintptr_t>(bytes);
    return from_bytes % bytes == 0 && to_bytes % bytes == 0 && aligned(from, size) && aligned(to, size);
  };
  if (fits(16))
    launch_copy<uint4>(from, from_bytes, to, to_bytes, heads, stream);
  else if (fits(4))
    launch_copy<unsigned>(from, from_bytes, to, to_bytes, heads, stream);
  else
    launch_copy<unsigned char>(from, from_bytes, to, to_bytes, heads, stream);
}

}  // namespace sparvar::cuda
