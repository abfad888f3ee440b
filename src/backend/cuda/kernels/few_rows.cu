// y = act(x W^T + b) for few rows of x, where reading the weights is all there is to do. A cluster of up to four
// blocks makes 64 output channels of all rows: each block multiplies its part of the depth, and the sums meet
// through the cluster's shared memory in a fixed order. One thread of a block keeps several stages of weights on their
// way; the first ones it asks for before it waits for the kernel that makes x.
#include <algorithm>

#include "backend/cuda/kernels/e4m3.cuh"
#include "backend/cuda/kernels/hopper.cuh"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/kernels/tensor_map.cuh"
#include "backend/cuda/kernels/wgmma.cuh"

namespace sparvar::cuda {
namespace {

constexpr int kRowBytes = 128;   // of a stage, of each channel and row
constexpr int kChannels = 64;    // of a cluster: those of a warpgroup's product
constexpr int kConsumers = 128;  // threads that multiply
constexpr int kThreads = kConsumers + 32;
constexpr int kBlocks = 2;      // on one multiprocessor
constexpr int kMostSplits = 4;  // of the depth; with more, the blocks have too little to read each
constexpr int kMostRows = 64;
constexpr int kRowFloats = kChannels + 4;  // of the sums in shared memory: no two lanes on one bank
constexpr int kWeightBytes = kChannels * kRowBytes;

/// kN columns of a product instruction: rows of x, and what lies behind them, which nobody reads.
template <int kN>
struct Shape {
  static constexpr int kStageBytes = kWeightBytes + kN * kRowBytes;
  static constexpr int kStages = 192 * 1024 / kBlocks / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // stages are 1024 bytes aligned
  static_assert(kN * kRowFloats * 4 <= kStages * kStageBytes);
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
  bool gelu;
};

#if __CUDA_ARCH__ >= 900

__device__ inline float gelu_tanh(float x) {
  return 0.5F * x * (1.0F + tanhf(0.7978845608F * (x + 0.044715F * x * x * x)));
}

/// Stages of the depth of this block of the cluster.
struct Range {
  int first, last;
  __device__ Range(const Arguments& a, int depth) {
    const int blocks = (a.in + depth - 1) / depth;
    const int rank = static_cast<int>(blockIdx.x) % a.splits;
    first = blocks * rank / a.splits;
    last = blocks * (rank + 1) / a.splits;
  }
};

template <typename S, typename X>
__device__ inline void fetch(const CUtensorMap* x, const CUtensorMap* w, int rows, Range range, int channel,
                             unsigned stages, unsigned full, unsigned empty) {
  const int count = range.last - range.first;
  const auto fetch_weights = [&](int i) {
    const int stage = i % S::kStages;
    arrive_expecting(full + 8 * stage, kWeightBytes + rows * kRowBytes);
    copy_tile(stages + stage * S::kStageBytes, w, (range.first + i) * kDepth<X>, channel, full + 8 * stage, kReadOnce);
  };
  const auto fetch_rows = [&](int i) {
    const int stage = i % S::kStages;
    copy_tile(stages + stage * S::kStageBytes + kWeightBytes, x, (range.first + i) * kDepth<X>, 0, full + 8 * stage,
              kReadOften);
  };
  const int early = min(count, S::kStages);
  for (int i = 0; i < early; ++i) fetch_weights(i);
  wait_for_earlier();
  for (int i = 0; i < early; ++i) fetch_rows(i);
  for (int i = early; i < count; ++i) {
    wait_barrier(empty + 8 * (i % S::kStages), (i / S::kStages - 1) % 2);
    fetch_weights(i);
    fetch_rows(i);
  }
}

template <typename S, int kN, typename X>
__device__ inline void multiply_stages(float (&sum)[kN / 8][4], int count, unsigned stages, unsigned full,
                                       unsigned empty) {
  for (int i = 0; i < count; ++i) {
    const unsigned stage = stages + i % S::kStages * S::kStageBytes;
    wait_barrier(full + 8 * (i % S::kStages), i / S::kStages % 2);
    begin_products();
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {  // an instruction takes 32 bytes of a row
      const std::uint64_t w = matrix_of(stage + step * 32);
      const std::uint64_t x = matrix_of(stage + kWeightBytes + step * 32);
      if constexpr (sizeof(X) == 1)
        multiply_e4m3<kN>(sum, w, x, i + step > 0 ? 1 : 0);
      else
        multiply<kN>(sum, w, x, i + step > 0 ? 1 : 0);
    }
    commit_products();
    wait_products<1>();
    if (i > 0 && threadIdx.x == 0) arrive(empty + 8 * ((i - 1) % S::kStages));
  }
  wait_products<0>();
}

/// Sums of this block to shared memory, [rows][kRowFloats].
template <int kN>
__device__ inline void put_sums(const float (&sum)[kN / 8][4], float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int channel = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kRowFloats + channel + i / 2 % 2 * 8] = sum[i / 4][i % 4];
}

template <typename X, typename Y>
__device__ inline void finish(const Arguments& a, unsigned sums, int first_channel) {
  const int each = kChannels / a.splits;  // channels that this block of the cluster writes
  const int rank = static_cast<int>(cluster_rank());
  const int vectors = each / 4;
  for (int i = static_cast<int>(threadIdx.x); i < a.rows * vectors; i += kConsumers) {
    const int row = i / vectors;
    const int channel = rank * each + i % vectors * 4;
    float4 total = make_float4(0, 0, 0, 0);
    for (int other = 0; other < a.splits; ++other) {
      const float4 part = read_cluster(sums + (row * kRowFloats + channel) * 4, other);
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    const int out = first_channel + channel;
    if (out >= a.out) continue;
    float values[4] = {total.x, total.y, total.z, total.w};
    if constexpr (sizeof(X) == 1) {
      const float row_scale = a.x_scales[row];
      for (int j = 0; j < 4; ++j) values[j] *= row_scale * a.w_scales[out + j];
    }
    if (a.bias != nullptr)
      for (int j = 0; j < 4; ++j) values[j] += read(static_cast<const Y*>(a.bias)[out + j]);
    if (a.gelu)
      for (int j = 0; j < 4; ++j) values[j] = gelu_tanh(values[j]);
    Y* to = static_cast<Y*>(a.y) + std::int64_t{row} * a.out + out;
    if constexpr (sizeof(Y) == 2) {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(values[0], values[1]),
                                       __floats2bfloat162_rn(values[2], values[3])};
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
    } else {
      *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

#endif

/// Numbers of type X in, of Y out.
template <int kN, typename X, typename Y>
__global__ void __launch_bounds__(kThreads, kBlocks)
    few_rows_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const Arguments a) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kN>;
  extern __shared__ unsigned char memory[];
  __shared__ std::uint64_t barriers[2 * S::kStages];
  const unsigned stages = (shared_address(memory) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(barriers);
  const unsigned empty = full + 8 * S::kStages;
  const int first_channel = static_cast<int>(blockIdx.x) / a.splits * kChannels;
  const Range range(a, kDepth<X>);
  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, 1);
    }
    publish_barriers();
  }
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(memory + (stages - shared_address(memory)));
  if (threadIdx.x < kConsumers) {
    float sum[kN / 8][4];
    multiply_stages<S, kN, X>(sum, range.last - range.first, stages, full, empty);
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // nobody reads the stages any more
    put_sums<kN>(sum, sums);
    wait_for_earlier();  // for every thread that writes
    cluster_barrier();
    finish<X, Y>(a, stages, first_channel);
  } else {
    if (threadIdx.x == kConsumers) fetch<S, X>(&x, &w, a.rows, range, first_channel, stages, full, empty);
    __syncwarp();
    cluster_barrier();
  }
  cluster_barrier();  // nobody leaves while others read its sums
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

/// As many parts of the depth as give every multiprocessor something to read, and no more than it has room for.
int splits_of(int in, int out, int depth) {
  const int tiles = (out + kChannels - 1) / kChannels;
  int splits = 1;
  while (splits < kMostSplits && 2 * splits * tiles <= kBlocks * multiprocessors() && 2 * splits * depth <= in)
    splits *= 2;
  return splits;
}

template <int kN, typename X, typename Y>
void launch(const FewRows& args, cudaStream_t stream) {
  using S = Shape<kN>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(few_rows_kernel<kN, X, Y>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  (void)allowed;  // a refusal shows at the launch
  const Arguments arguments{.x_scales = args.x_scales,
                            .w_scales = args.w_scales,
                            .bias = args.bias,
                            .y = args.y,
                            .rows = args.rows,
                            .in = args.in,
                            .out = args.out,
                            .splits = splits_of(args.in, args.out, kDepth<X>),
                            .gelu = args.gelu};
  const auto splits = static_cast<unsigned>(arguments.splits);
  launch_early(few_rows_kernel<kN, X, Y>, blocks_for(args.out, kChannels) * splits, kThreads, S::kSharedBytes, stream,
               splits, tensor_map<X>(args.x, args.rows, args.in, args.rows),
               tensor_map<X>(args.w, args.out, args.in, kChannels), arguments);
  check_launch("product of few rows");
}

template <typename X, typename Y>
void launch_fitting(const FewRows& args, cudaStream_t stream) {
  if (args.rows <= 8) return launch<8, X, Y>(args, stream);
  if (args.rows <= 32) return launch<32, X, Y>(args, stream);
  launch<64, X, Y>(args, stream);
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
  return (type == DType::e4m3 || type == DType::bf16) && launches_overlap() && tensor_map_encoder() != nullptr &&
         rows >= 1 && rows <= kMostRows && in * element % 16 == 0 && in * element >= kRowBytes && out % 8 == 0 &&
         in < (1 << 30) && out < (1 << 30);
}

void few_rows(const FewRows& args, cudaStream_t stream) {
  if (args.type == DType::e4m3)
    launch_result<E4m3>(args, stream);
  else
    launch_result<bf16>(args, stream);
}

}  // namespace sparvar::cuda
