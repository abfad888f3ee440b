// LayerNorm and RMSNorm of rows, with the gated residual before them. A row stays in registers from the first read to
// the last write: the mean, then the squares around it, then the output, and memory is touched once.
#include <algorithm>
#include <string>
#include <type_traits>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/e4m3.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kWidest = 16384;
constexpr int kThreads = 1024;  // at most, of one row
constexpr int kRowsOfWarps = 4;

struct Row {
  RowNorm norm;
  const float* x = nullptr;  // of residual in the kernels that add
  float* residual = nullptr;
  const void* y = nullptr;
  const float* gate = nullptr;
  std::uint32_t period = 1;
  std::uint32_t gate_period = 1;
  void* out = nullptr;
};

struct Nothing {};  // the type of a y that is not there

// Data of rows bypass the first cache, which then keeps the modulation that many rows share.
template <int kUnit>
__device__ inline void load(const float* from, float* x) {
  if constexpr (kUnit == 4) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    x[0] = __ldcg(from);
  }
}
template <int kUnit>
__device__ inline void load(const bf16* from, float* x) {
  if constexpr (kUnit == 4) {
    const uint2 four = __ldcg(reinterpret_cast<const uint2*>(from));
    x[0] = __uint_as_float(four.x << 16), x[1] = __uint_as_float(four.x & 0xffff0000U);
    x[2] = __uint_as_float(four.y << 16), x[3] = __uint_as_float(four.y & 0xffff0000U);
  } else {
    x[0] = read(*from);
  }
}
template <int kUnit>
__device__ inline void load_shared(const float* from, float* x) {
  if constexpr (kUnit == 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    x[0] = __ldg(from);
  }
}
template <int kUnit>
__device__ inline void store(float* to, const float* x) {
  if constexpr (kUnit == 4)
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  else
    *to = x[0];
}
template <int kUnit>
__device__ inline void store(bf16* to, const float* x) {
  if constexpr (kUnit == 4) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    *to = rounded<bf16>(x[0]);
  }
}

template <int kUnit>
__device__ inline void store(E4m3* to, const float* x) {
  if constexpr (kUnit == 4)
    *reinterpret_cast<unsigned*>(to) = four_e4m3(x[0], x[1], x[2], x[3]);
  else
    *to = one_e4m3(x[0]);
}

/// First column of the thread's i-th unit: kUnit neighbours, and blockDim.x units from one to the next.
template <int kUnit>
__device__ inline int column(int i) {
  return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kUnit;
}

/// Scale, shift and gate of a thread that has one unit: read beside the row, or before anything else where they are
/// settled. Between products that read weights, a trip to memory is most of what the norm of a few rows takes. Threads
/// of more units read them where they use them, mostly from the first cache, as rows share them.
template <int kUnit>
struct Held {
  float scale[kUnit], shift[kUnit] = {}, gate[kUnit];  // without a scale its offset is 0

  __device__ void read(const Row& args, std::int64_t row) {
    for (int j = 0; j < kUnit; ++j) scale[j] = gate[j] = 1.0F;
    const int at = column<kUnit>(0);
    if (row >= args.norm.rows || at >= args.norm.width) return;
    const auto of_row = [&](const float* rows, std::uint32_t period, float(&x)[kUnit]) {
      if (rows != nullptr)
        load_shared<kUnit>(rows + static_cast<std::uint32_t>(row) / period * std::int64_t{args.norm.width} + at, x);
    };
    of_row(args.norm.scale, args.period, scale);
    of_row(args.norm.shift, args.period, shift);
    of_row(args.gate, args.gate_period, gate);
  }
};

/// x += gate * y, also in memory.
template <int kUnit, int kUnits, typename Y>
__device__ inline void add_gated(const Row& args, std::int64_t row, const Held<kUnit>& held,
                                 float (&x)[kUnits][kUnit]) {
  const int width = args.norm.width;
  const float* gate = args.gate;
  if (gate != nullptr) gate += static_cast<std::uint32_t>(row) / args.gate_period * std::int64_t{width};
  float y[kUnits][kUnit];
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (column<kUnit>(i) < width) load<kUnit>(static_cast<const Y*>(args.y) + row * width + column<kUnit>(i), y[i]);
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (column<kUnit>(i) >= width) continue;
    float g[kUnit];
    for (int j = 0; j < kUnit; ++j) g[j] = kUnits == 1 ? held.gate[j] : 1.0F;
    if (kUnits > 1 && gate != nullptr) load_shared<kUnit>(gate + column<kUnit>(i), g);
    for (int j = 0; j < kUnit; ++j) x[i][j] += g[j] * y[i][j];
    store<kUnit>(args.residual + row * width + column<kUnit>(i), x[i]);
  }
}

/// out = (x - mean) * inverse * (offset + scale) + shift
template <int kUnit, int kUnits, typename Out>
__device__ inline void write_normalised(const Row& args, std::int64_t row, const Held<kUnit>& held, float mean,
                                        float inverse, float (&x)[kUnits][kUnit]) {
  const RowNorm& norm = args.norm;
  const std::int64_t modulation = static_cast<std::uint32_t>(row) / args.period * std::int64_t{norm.width};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (column<kUnit>(i) >= norm.width) continue;
    float scale[kUnit];
    float shift[kUnit] = {};
    for (int j = 0; j < kUnit; ++j) scale[j] = kUnits == 1 ? held.scale[j] : 1.0F;
    for (int j = 0; kUnits == 1 && j < kUnit; ++j) shift[j] = held.shift[j];
    if (kUnits > 1 && norm.scale != nullptr) load_shared<kUnit>(norm.scale + modulation + column<kUnit>(i), scale);
    if (kUnits > 1 && norm.shift != nullptr) load_shared<kUnit>(norm.shift + modulation + column<kUnit>(i), shift);
    for (int j = 0; j < kUnit; ++j) x[i][j] = (x[i][j] - mean) * inverse * (norm.scale_offset + scale[j]) + shift[j];
    if constexpr (!std::is_same_v<Out, E4m3>)
      store<kUnit>(static_cast<Out*>(args.out) + row * norm.width + column<kUnit>(i), x[i]);
  }
}

/// x / scale as e4m3, with the row's scale.
template <int kUnit, int kUnits>
__device__ inline void write_quantised(const Row& args, std::int64_t row, float (&x)[kUnits][kUnit], float* parts) {
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (column<kUnit>(i) < args.norm.width)
      for (int j = 0; j < kUnit; ++j) largest = fmaxf(largest, fabsf(x[i][j]));
  const float scale = e4m3_scale(row_max(largest, parts));
  const float inverse = 1.0F / scale;
  if (threadIdx.x == 0) args.norm.out_scales[row] = scale;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (column<kUnit>(i) >= args.norm.width) continue;
    for (int j = 0; j < kUnit; ++j) x[i][j] *= inverse;
    store<kUnit>(static_cast<E4m3*>(args.out) + row * args.norm.width + column<kUnit>(i), x[i]);
  }
}

/// Fewer threads where each holds much, so that all of it stays in registers.
template <int kUnit, int kUnits>
constexpr int most_threads() {
  return kUnit * kUnits > 16 ? kThreads / 2 : kThreads;
}

/// A row to blockDim.x threads, blockDim.y rows to a block.
template <int kUnit, int kUnits, typename Y, typename Out>
__global__ void __launch_bounds__((most_threads<kUnit, kUnits>())) row_kernel(const Row args) {
  __shared__ float sums[32];
  __shared__ float squares[32];
  let_next_start();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  Held<kUnit> held;
  if constexpr (kUnits == 1)
    if (args.norm.settled) held.read(args, row);
  wait_for_earlier();
  if (row >= args.norm.rows) return;  // whole rows: where rows share a block, none waits for another
  if constexpr (kUnits == 1)
    if (!args.norm.settled) held.read(args, row);
  const int width = args.norm.width;
  float x[kUnits][kUnit] = {};  // zeros beyond the width
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (column<kUnit>(i) < width) load<kUnit>(args.x + row * width + column<kUnit>(i), x[i]);
  if constexpr (!std::is_same_v<Y, Nothing>) {
    add_gated<kUnit, kUnits, Y>(args, row, held, x);
    if (args.out == nullptr) return;
  }

  float mean = 0.0F;
  if (args.norm.centred) {
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
      for (int j = 0; j < kUnit; ++j) sum += x[i][j];
    mean = row_sum(sum, sums) / static_cast<float>(width);
  }
  float square = 0.0F;
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (column<kUnit>(i) < width)
      for (int j = 0; j < kUnit; ++j) square += (x[i][j] - mean) * (x[i][j] - mean);
  const float inverse = 1.0F / sqrtf(row_sum(square, squares) / static_cast<float>(width) + args.norm.eps);
  write_normalised<kUnit, kUnits, Out>(args, row, held, mean, inverse, x);
  if constexpr (std::is_same_v<Out, E4m3>) {
    __shared__ float largest[32];
    write_quantised<kUnit, kUnits>(args, row, x, largest);
  }
}

template <int kUnit, int kUnits, typename Y>
void launch_units(const Row& args, DType out_type, cudaStream_t stream) {
  const int units = (args.norm.width + kUnit - 1) / kUnit;
  const int threads = std::max(1, (units + 32 * kUnits - 1) / (32 * kUnits)) * 32;
  const int rows = threads == 32 ? kRowsOfWarps : 1;
  const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
  const auto launch = [&](auto out) {
    launch_early(row_kernel<kUnit, kUnits, Y, decltype(out)>, blocks_for(args.norm.rows, rows), block, 0, stream, 1,
                 args);
  };
  if (out_type == DType::e4m3)
    launch(E4m3{});
  else
    with_type(out_type, launch);
  check_launch("row norm");
}

bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

template <typename Y>
void launch(const Row& args, DType out_type, cudaStream_t stream) {
  const int width = args.norm.width;
  const bool vectors = width % 4 == 0 && aligned(args.x, 16) && aligned(args.y, 16) && aligned(args.gate, 16) &&
                       aligned(args.norm.scale, 16) && aligned(args.norm.shift, 16) && aligned(args.out, 16);
  if (!vectors)
    return width <= 1024 ? launch_units<1, 4, Y>(args, out_type, stream)
                         : launch_units<1, 16, Y>(args, out_type, stream);
  // Few rows: all threads that a row can use. Many: two units a thread, so that loads overlap and rows share a
  // multiprocessor, which hides the sums of one behind the loads of another.
  const int units = width / 4;
  if (units <= 32 || (args.norm.rows <= 256 && units <= kThreads)) return launch_units<4, 1, Y>(args, out_type, stream);
  if (units <= 2 * kThreads) return launch_units<4, 2, Y>(args, out_type, stream);
  launch_units<4, 4, Y>(args, out_type, stream);
}

Row row_of(const RowNorm& norm) {
  constexpr std::int64_t most = (std::int64_t{1} << 31) - 1;
  if (norm.width > kWidest || norm.rows > most)
    throw Error(ErrorKind::usage, "CUDA norms take up to " + std::to_string(kWidest) + " channels and 2^31 - 1 rows, " +
                                      "got " + std::to_string(norm.rows) + " rows of " + std::to_string(norm.width));
  Row row;
  row.norm = norm;
  if (norm.scale == nullptr) row.norm.scale_offset = 0;  // 1, as the contract says, whatever the offset
  row.period = static_cast<std::uint32_t>(std::clamp<std::int64_t>(norm.period, 1, most));
  return row;
}

}  // namespace

void normalise(const RowNorm& norm, const float* x, void* out, DType out_type, cudaStream_t stream) {
  if (norm.rows <= 0 || norm.width <= 0) return;
  Row row = row_of(norm);
  row.x = x;
  row.out = out;
  launch<Nothing>(row, out_type, stream);
}

void add_gated_normalise(const RowNorm& norm, float* residual, const void* y, DType y_type, const float* gate,
                         std::int64_t gate_period, void* out, DType out_type, cudaStream_t stream) {
  if (norm.rows <= 0 || norm.width <= 0) return;
  Row row = row_of(norm);
  row.x = residual;
  row.residual = residual;
  row.y = y;
  row.gate = gate;
  row.gate_period = static_cast<std::uint32_t>(std::clamp<std::int64_t>(gate_period, 1, 0x7fffffff));
  row.out = out;
  with_type(y_type, [&](auto type) { launch<decltype(type)>(row, out_type, stream); });
}

}  // namespace sparvar::cuda
