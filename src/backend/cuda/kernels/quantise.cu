// Rows of f32 or bf16 to e4m3 with a scale each, GELU in between where it is asked for: a row stays in registers from
// the read to the write. And the scales of a product that the library does not apply.
#include <algorithm>
#include <string>

#include "backend/cuda/kernels/e4m3.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kUnit = 8;  // neighbours that a thread reads at once
constexpr int kThreads = 1024;
constexpr int kRowsOfWarps = 4;
constexpr int kFewRows = 256;  // up to here a row gets all threads that it can use

__device__ inline void load(const float* from, float* x) {
  const float4 a = __ldcs(reinterpret_cast<const float4*>(from));
  const float4 b = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ inline void load(const bf16* from, float* x) {
  const uint4 eight = __ldcs(reinterpret_cast<const uint4*>(from));
  const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000U);
  }
}

/// x sigmoid(2 u) is 0.5 x (1 + tanh(u)); good to 1e-6, far inside what 3 bits of fraction keep.
__device__ inline float gelu_tanh(float x) {
  const float u = 0.7978845608F * (x + 0.044715F * x * x * x);
  return __fdividef(x, 1.0F + __expf(-2.0F * u));
}

/// First column of the thread's i-th unit.
__device__ inline int column(int i) {
  return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kUnit;
}

/// A row to blockDim.x threads, blockDim.y rows to a block.
template <typename T, int kUnits, bool kGelu>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const QuantiseRows args) {
  __shared__ float parts[32];
  let_next_start();
  wait_for_earlier();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;  // whole rows: where rows share a block, none waits for another
  const T* from = static_cast<const T*>(args.x) + row * args.width;
  float x[kUnits][kUnit] = {};
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (column(i) < args.width) load(from + column(i), x[i]);
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    for (int j = 0; j < kUnit; ++j) {
      if constexpr (kGelu) x[i][j] = gelu_tanh(x[i][j]);
      largest = fmaxf(largest, fabsf(x[i][j]));
    }
  const float scale = e4m3_scale(row_max(largest, parts));
  const float inverse = 1.0F / scale;
  if (threadIdx.x == 0) args.scales[row] = scale;
  auto* const to = static_cast<std::uint8_t*>(args.out) + row * args.width;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (column(i) >= args.width) continue;
    for (int j = 0; j < kUnit; ++j) x[i][j] *= inverse;
    *reinterpret_cast<uint2*>(to + column(i)) =
        make_uint2(four_e4m3(x[i][0], x[i][1], x[i][2], x[i][3]), four_e4m3(x[i][4], x[i][5], x[i][6], x[i][7]));
  }
}

constexpr int kScaleThreads = 256;
constexpr std::int64_t kMostBlocks = 65535;  // of the grid's second axis

__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const ScaleProduct args) {
  let_next_start();
  wait_for_earlier();
  const int column = (static_cast<int>(blockIdx.x) * kScaleThreads + static_cast<int>(threadIdx.x)) * kUnit;
  if (column >= args.out) return;
  float scale[kUnit], bias[kUnit] = {};
  load(args.w_scales + column, scale);
  if (args.bias != nullptr) load(static_cast<const bf16*>(args.bias) + column, bias);
  for (std::int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    bf16* const at = static_cast<bf16*>(args.y) + row * args.out + column;
    const float row_scale = args.x_scales[row];
    float y[kUnit];
    load(at, y);
    for (int j = 0; j < kUnit; ++j) {
      y[j] = y[j] * (row_scale * scale[j]) + bias[j];
      if (args.gelu) y[j] = gelu_tanh(y[j]);
    }
    const __nv_bfloat162 pairs[4] = {__floats2bfloat162_rn(y[0], y[1]), __floats2bfloat162_rn(y[2], y[3]),
                                     __floats2bfloat162_rn(y[4], y[5]), __floats2bfloat162_rn(y[6], y[7])};
    *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(pairs);
  }
}

template <typename T, int kUnits>
void launch(const QuantiseRows& args, cudaStream_t stream) {
  const int units = args.width / kUnit;
  const int threads = (units + 32 * kUnits - 1) / (32 * kUnits) * 32;
  const int rows = threads == 32 ? kRowsOfWarps : 1;
  const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
  const unsigned blocks = blocks_for(args.rows, rows);
  if (args.gelu)
    launch_early(quantise_kernel<T, kUnits, true>, blocks, block, 0, stream, 1, args);
  else
    launch_early(quantise_kernel<T, kUnits, false>, blocks, block, 0, stream, 1, args);
  check_launch("quantise");
}

template <typename T>
void launch_fitting(const QuantiseRows& args, cudaStream_t stream) {
  const int units = args.width / kUnit;
  if (units <= 64 || (args.rows <= kFewRows && units <= kThreads)) return launch<T, 1>(args, stream);
  if (units <= 512 || (args.rows <= kFewRows && units <= 2 * kThreads)) return launch<T, 2>(args, stream);
  launch<T, 4>(args, stream);
}

}  // namespace

void quantise_rows(const QuantiseRows& args, cudaStream_t stream) {
  if (args.rows <= 0 || args.width <= 0) return;
  if (args.width % kUnit != 0 || args.width > QuantiseRows::kWidest || args.rows >= (std::int64_t{1} << 31))
    throw Error(ErrorKind::usage, "rows of " + std::to_string(args.width) +
                                      " numbers cannot be made e4m3: a multiple of " + std::to_string(kUnit) +
                                      " up to " + std::to_string(QuantiseRows::kWidest) + " is needed");
  with_type(args.type, [&](auto type) { launch_fitting<decltype(type)>(args, stream); });
}

void scale_product(const ScaleProduct& args, cudaStream_t stream) {
  if (args.rows <= 0 || args.out <= 0) return;
  const dim3 grid(blocks_for(args.out / kUnit, kScaleThreads),
                  static_cast<unsigned>(std::min<std::int64_t>(args.rows, kMostBlocks)));
  launch_early(scale_kernel, grid, kScaleThreads, 0, stream, 1, args);
  check_launch("scale product");
}

}  // namespace sparvar::cuda
