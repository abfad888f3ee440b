// y = act(x W^T + b) for few rows of x, where reading the weights is most of what there is to do. A cluster of up to
// four blocks makes 64 output channels of all rows, or 128 of more than 64 rows: each block multiplies its part of the
// depth, and the sums meet through the cluster's shared memory in a fixed order. Two threads of a block keep several
// stages of weights and of rows on their way; the first weights are asked for before the kernel that makes x is waited
// for.
#include <algorithm>
#include <type_traits>

#include "backend/cuda/kernels/e4m3.cuh"
#include "backend/cuda/kernels/hopper.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/tensor_map.cuh"
#include "backend/cuda/kernels/wgmma.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kRowBytes = 128;     // of a stage, of each channel and row
constexpr int kPartChannels = 64;  // those of a warpgroup's product
constexpr int kPartBytes = kPartChannels * kRowBytes;
constexpr int kMostSplits = 4;  // of the depth; with more, the blocks have too little to read each
constexpr int kFewRows = 64;    // so many take 64 channels of a block
constexpr int kMostRows = 144;

/// kParts: of 64 channels, each a warpgroup's. kN: columns of a product instruction, which are rows of x, and what lies
/// behind them, which nobody reads. Where a block has one part, two blocks share a multiprocessor: the second one's
/// weights are on their way while the first one finishes.
template <int kParts, int kN>
struct Shape {
  static constexpr int kBlocks = kParts == 1 ? 2 : 1;
  static constexpr int kChannels = kParts * kPartChannels;
  static constexpr int kConsumers = kParts * 128;  // threads that multiply
  static constexpr int kThreads = kConsumers + 64;
  static constexpr int kWeightBytes = kParts * kPartBytes;
  static constexpr int kStageBytes = kWeightBytes + kN * kRowBytes;
  static constexpr int kStages = (kBlocks == 2 ? 96 : 224) * 1024 / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // stages are 1024 bytes aligned
  static constexpr int kRowFloats = kChannels + 4;  // of the sums in shared memory: no two lanes on one bank
  static_assert(kN * kRowFloats * 4 <= kStages * kStageBytes && kConsumers % (kChannels / 4) == 0);
};

/// Of numbers of type X: how many of the depth are in a stage.
template <typename X>
constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(X));

struct Arguments {
  const float* x_scales;  // of e4m3
  const float* w_scales;
  const void* bias;
  void* y;
  int rows, in, out;
  int splits;
  bool gelu, settled;
};

#if __CUDA_ARCH__ >= 900

/// For results of 8 bits the quotient x / (1 + e^-2u) is good enough, u the argument of the tanh.
template <typename Y>
__device__ inline float gelu_tanh(float x) {
  const float u = 0.7978845608F * (x + 0.044715F * x * x * x);
  if constexpr (sizeof(Y) == 2) return __fdividef(x, 1.0F + __expf(-2.0F * u));
  return 0.5F * x * (1.0F + tanhf(u));
}

/// Stages of the depth of this block of the cluster.
struct Range {
  int first, count;
  __device__ Range(const Arguments& a, int depth) {
    const int blocks = (a.in + depth - 1) / depth;
    const int rank = static_cast<int>(blockIdx.x) % a.splits;
    first = blocks * rank / a.splits;
    count = blocks * (rank + 1) / a.splits - first;
  }
};

/// Tiles of w, or of x, for one stage after the other; `to`: in the first of them.
template <typename S, typename X>
__device__ inline void fetch(const CUtensorMap* map, Range range, int row, unsigned bytes, unsigned to, unsigned full,
                             unsigned empty, std::uint64_t policy) {
  Ring<S::kStages> ring;
  for (int i = 0; i < range.count; ++i) {
    if (i >= S::kStages) wait_barrier(empty + 8 * ring.stage, ring.turn ^ 1U);
    arrive_expecting(full + 8 * ring.stage, bytes);
    copy_tile(to + ring.stage * S::kStageBytes, map, (range.first + i) * kDepth<X>, row, full + 8 * ring.stage, policy);
    ring.advance();
  }
}

template <typename S, int kN, typename X>
__device__ inline void multiply_stages(float (&sum)[kN / 8][4], int count, unsigned stages, unsigned full,
                                       unsigned empty) {
  const unsigned part = warpgroup() * kPartBytes;
  Ring<S::kStages> ring;
  unsigned last = 0;  // barrier of the stage before
  for (int i = 0; i < count; ++i) {
    const unsigned stage = stages + ring.stage * S::kStageBytes;
    wait_barrier(full + 8 * ring.stage, ring.turn);
    begin_products();
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {  // an instruction takes 32 bytes of a row
      const std::uint64_t w = matrix_of(stage + part + step * 32);
      const std::uint64_t x = matrix_of(stage + S::kWeightBytes + step * 32);
      if constexpr (sizeof(X) == 1)
        multiply_e4m3<kN>(sum, w, x, i + step > 0 ? 1 : 0);
      else
        multiply<kN>(sum, w, x, i + step > 0 ? 1 : 0);
    }
    commit_products();
    wait_products<1>();
    if (i > 0 && threadIdx.x % 128 == 0) arrive(last);
    last = empty + 8 * ring.stage;
    ring.advance();
  }
  wait_products<0>();
}

/// Sums of this block to shared memory, [rows][kRowFloats].
template <typename S, int kN>
__device__ inline void put_sums(const float (&sum)[kN / 8][4], float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int channel = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * S::kRowFloats + channel + i / 2 % 2 * 8] = sum[i / 4][i % 4];
}

/// The four channels that a thread writes, of all its rows, with what the weights say of them. That is read before the
/// kernel that makes x is waited for: later it would queue behind the weights that the next product asks for.
template <typename S, typename X, typename Y>
struct Channels {
  int vectors;  // of four, that this block of the cluster writes
  int first;    // of the cluster's channels
  int out;
  float bias[4] = {};
  float scale[4] = {};

  __device__ Channels(const Arguments& a, int first_channel) : vectors(S::kChannels / a.splits / 4) {
    const int rank = static_cast<int>(blockIdx.x) % a.splits;
    first = (rank * vectors + static_cast<int>(threadIdx.x) % vectors) * 4;
    out = first_channel + first;
    if (out >= a.out) return;
    if (a.bias != nullptr)
      for (int j = 0; j < 4; ++j) bias[j] = read(static_cast<const Y*>(a.bias)[out + j]);
    if constexpr (sizeof(X) == 1)
      for (int j = 0; j < 4; ++j) scale[j] = a.w_scales[out + j];
  }

  __device__ void write(const Arguments& a, int row, float4 sum) const {
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
    if constexpr (sizeof(X) == 1) {
      const float row_scale = a.x_scales[row];
      for (int j = 0; j < 4; ++j) values[j] *= row_scale * scale[j];
    }
    for (int j = 0; j < 4; ++j) values[j] += bias[j];
    if (a.gelu)
      for (int j = 0; j < 4; ++j) values[j] = gelu_tanh<Y>(values[j]);
    Y* to = static_cast<Y*>(a.y) + std::int64_t{row} * a.out + out;
    if constexpr (sizeof(Y) == 2) {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(values[0], values[1]),
                                       __floats2bfloat162_rn(values[2], values[3])};
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
    } else {
      *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    }
  }
};

/// With several sums on their way to a thread at once: of a row's blocks, or of several rows of one block.
template <typename S, typename X, typename Y>
__device__ inline void finish(const Arguments& a, unsigned sums, const Channels<S, X, Y>& channels) {
  if (channels.out >= a.out) return;
  const int step = S::kConsumers / channels.vectors;
  const auto place = [&](int row) { return sums + (row * S::kRowFloats + channels.first) * 4; };
  int row = static_cast<int>(threadIdx.x) / channels.vectors;
  if (a.splits == 1) {
    constexpr int kAtOnce = 4;
    for (; row < a.rows; row += kAtOnce * step) {
      float4 sum[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum[i] = read_shared(place(min(row + i * step, a.rows - 1)));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (row + i * step < a.rows) channels.write(a, row + i * step, sum[i]);
    }
    return;
  }
  for (; row < a.rows; row += step) {
    float4 total = make_float4(0, 0, 0, 0);
    for (int other = 0; other < a.splits; ++other) {
      const float4 part = read_cluster(place(row), other);
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    channels.write(a, row, total);
  }
}

#endif

/// Numbers of type X in, of Y out.
template <int kParts, int kN, typename X, typename Y>
__global__ void __launch_bounds__((Shape<kParts, kN>::kThreads), (Shape<kParts, kN>::kBlocks))
    few_rows_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const Arguments a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kParts, kN>;
  extern __shared__ unsigned char memory[];
  __shared__ std::uint64_t barriers[2 * S::kStages];
  const unsigned stages = (shared_address(memory) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(barriers);
  const unsigned empty = full + 8 * S::kStages;
  const int first_channel = static_cast<int>(blockIdx.x) / a.splits * S::kChannels;
  const Range range(a, kDepth<X>);
  const bool fetches_weights = threadIdx.x == S::kConsumers, fetches_rows = threadIdx.x == S::kConsumers + 32;
  let_next_start();
  if (!a.settled) wait_for_earlier();
  if (fetches_weights) fetch_map(&w);
  if (fetches_rows) fetch_map(&x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      init_barrier(full + 8 * i, 2);
      init_barrier(empty + 8 * i, kParts);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < S::kConsumers) {
    const Channels<S, X, Y> channels(a, first_channel);
    float sum[kN / 8][4];
    multiply_stages<S, kN, X>(sum, range.count, stages, full, empty);
    asm volatile("bar.sync 1, %0;" ::"n"(S::kConsumers) : "memory");  // nobody reads the stages any more
    put_sums<S, kN>(sum, reinterpret_cast<float*>(memory + (stages - shared_address(memory))));
    wait_for_earlier();  // for every thread that writes
    cluster_barrier();
    finish<S, X, Y>(a, stages, channels);
  } else {
    if (fetches_weights) fetch<S, X>(&w, range, first_channel, S::kWeightBytes, stages, full, empty, kReadOnce);
    if (fetches_rows) {
      wait_for_earlier();
      fetch<S, X>(&x, range, 0, a.rows * kRowBytes, stages + S::kWeightBytes, full, empty, kReadOften);
    }
    __syncwarp();
    cluster_barrier();
  }
  meet_cluster();  // nobody leaves while others read its sums
#endif
}

// ---------------------------------------------------------------- host

/// Boxes of `box` rows by 128 bytes of a matrix [rows, columns] of numbers of type X.
template <typename X>
CUtensorMap tensor_map(const void* matrix, int rows, int columns, int box) {
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * sizeof(X)};
  const cuuint32_t boxes[2] = {kDepth<X>, static_cast<cuuint32_t>(box)};
  const cuuint32_t steps[2] = {1, 1};
  constexpr auto kType = sizeof(X) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status = tensor_map_encoder()(&map, kType, 2, const_cast<void*>(matrix), sizes, strides, boxes, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error(ErrorKind::system, "CUDA: a tensor map was refused");
  return map;
}

/// How a product is divided: tiles of channels, and as many parts of the depth as give every multiprocessor something
/// to read, and no more than it has room for.
struct Division {
  int channels, room, splits = 1;
  Division(int rows, int in, int out, int depth)
      : channels(rows <= kFewRows ? kPartChannels : 2 * kPartChannels),
        room((rows <= kFewRows ? 2 : 1) * multiprocessors()) {
    while (splits < kMostSplits && 2 * splits * tiles(out) <= room && 2 * splits * depth <= in) splits *= 2;
  }
  int tiles(int out) const { return (out + channels - 1) / channels; }
};

template <int kParts, int kN, typename X, typename Y>
void launch(const FewRows& args, cudaStream_t stream) {
  using S = Shape<kParts, kN>;
  static const cudaError_t allowed = cudaFuncSetAttribute(few_rows_kernel<kParts, kN, X, Y>,
                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const Division division(args.rows, args.in, args.out, kDepth<X>);
  const Arguments arguments{.x_scales = args.x_scales,
                            .w_scales = args.w_scales,
                            .bias = args.bias,
                            .y = args.y,
                            .rows = args.rows,
                            .in = args.in,
                            .out = args.out,
                            .splits = division.splits,
                            .gelu = args.gelu,
                            .settled = args.settled};
  const auto splits = static_cast<unsigned>(division.splits);
  launch_early(few_rows_kernel<kParts, kN, X, Y>, blocks_for(args.out, S::kChannels) * splits, S::kThreads,
               S::kSharedBytes, stream, splits, tensor_map<X>(args.x, args.rows, args.in, args.rows),
               tensor_map<X>(args.w, args.out, args.in, S::kChannels), arguments);
  check_launch("product of few rows");
}

template <typename X, typename Y>
void launch_fitting(const FewRows& args, cudaStream_t stream) {
  if (args.rows <= 8) return launch<1, 8, X, Y>(args, stream);
  if (args.rows <= 32) return launch<1, 32, X, Y>(args, stream);
  if (args.rows <= kFewRows) return launch<1, 64, X, Y>(args, stream);
  if (args.rows <= 72) return launch<2, 72, X, Y>(args, stream);
  if (args.rows <= 96) return launch<2, 96, X, Y>(args, stream);
  if (args.rows <= 128) return launch<2, 128, X, Y>(args, stream);
  launch<2, kMostRows, X, Y>(args, stream);
}

template <typename X>
void launch_result(const FewRows& args, cudaStream_t stream) {
  if (args.y_type == DType::f32)
    launch_fitting<X, float>(args, stream);
  else
    launch_fitting<X, bf16>(args, stream);
}

}  // namespace

bool supports_few_rows(DType type, std::int64_t rows, std::int64_t in, std::int64_t out) {
  const auto element = type == DType::e4m3 ? 1 : 2;
  const bool fits = (type == DType::e4m3 || type == DType::bf16) && launches_overlap() &&
                    tensor_map_encoder() != nullptr && rows >= 1 && rows <= kMostRows && in * element % 16 == 0 &&
                    in * element >= kRowBytes && out % 8 == 0 && in < (1 << 30) && out < (1 << 30);
  if (!fits || rows <= kFewRows) return fits;
  // The more rows, the more of the GPU must multiply for this to be faster than cuBLASLt (measured on an H200).
  constexpr int kRowsOfAll = 170;
  const Division division(static_cast<int>(rows), static_cast<int>(in), static_cast<int>(out), kRowBytes / element);
  const int blocks = division.tiles(static_cast<int>(out)) * division.splits;
  return blocks <= division.room && blocks * kRowsOfAll >= rows * division.room;
}

void few_rows(const FewRows& args, cudaStream_t stream) {
  if (args.type == DType::e4m3)
    launch_result<E4m3>(args, stream);
  else
    launch_result<bf16>(args, stream);
}

}  // namespace sparvar::cuda
