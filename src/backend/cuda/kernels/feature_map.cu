// Work on feature maps [batch, pixels, channels] around the convolutions: nearest upsampling, changes of layout.
// (group_norm.cu has the group norm.)
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

/// Every unit of a row into two columns of two rows. Blocks walk over the rows.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    double_pixels(const Unit* __restrict__ x, std::int64_t rows, int width, int units, Unit* __restrict__ out) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const std::int64_t row_units = std::int64_t{width} * units;
  if (i >= row_units) return;
  const std::int64_t column =
      std::int64_t{i} + i / static_cast<unsigned>(units) * units;  // pixel i / units becomes pixel 2 (i / units)
  for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Unit value = x[row * row_units + i];
    Unit* to = out + 4 * row * row_units + column;
    to[0] = value;
    to[units] = value;
    to[2 * row_units] = value;
    to[2 * row_units + units] = value;
  }
}

template <typename Unit>
void double_units(const void* x, std::int64_t rows, int width, std::int64_t units, void* out, cudaStream_t stream) {
  const dim3 blocks(blocks_for(width * units, kThreads), static_cast<unsigned>(std::min<std::int64_t>(rows, 65535)));
  double_pixels<Unit><<<blocks, kThreads, 0, stream>>>(static_cast<const Unit*>(x), rows, width,
                                                       static_cast<int>(units), static_cast<Unit*>(out));
}

__device__ inline float clamped(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

/// [rows, columns] -> [columns, rows] of every picture through 32 x 32 tiles.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    transpose(const From* __restrict__ x, std::int64_t rows, std::int64_t columns, unsigned row_tiles,
              unsigned column_tiles, float limit, To* __restrict__ out) {
  __shared__ float tile[32][33];
  const std::int64_t row = std::int64_t{blockIdx.x / column_tiles % row_tiles} * 32;
  const std::int64_t column = std::int64_t{blockIdx.x % column_tiles} * 32;
  const std::int64_t picture = blockIdx.x / column_tiles / row_tiles * rows * columns;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32)
    if (row + i < rows && column + lane < columns)
      tile[i][lane] = read(x[picture + (row + i) * columns + column + lane]);
  __syncthreads();
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32)
    if (column + i < columns && row + lane < rows)
      out[picture + (column + i) * rows + row + lane] = rounded<To>(clamped(tile[lane][i], limit));
}

/// [pixels, channels] -> [channels, pixels] for few channels: a thread per pixel.
template <typename From>
__global__ void __launch_bounds__(kThreads)
    split_pixels(const From* __restrict__ x, std::int64_t all_pixels, std::int64_t pixels, int channels, float limit,
                 float* __restrict__ out) {
  const std::int64_t p = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= all_pixels) return;
  const std::int64_t picture = p / pixels;
  float* to = out + picture * channels * pixels + (p - picture * pixels);
  for (int c = 0; c < channels; ++c) to[c * pixels] = clamped(read(x[p * channels + c]), limit);
}

template <typename From, typename To>
void transpose_pictures(const From* x, int batch, std::int64_t rows, std::int64_t columns, float limit, To* out,
                        cudaStream_t stream) {
  const unsigned row_tiles = blocks_for(rows, 32);
  const unsigned column_tiles = blocks_for(columns, 32);
  transpose<<<static_cast<unsigned>(batch) * row_tiles * column_tiles, kThreads, 0, stream>>>(
      x, rows, columns, row_tiles, column_tiles, limit, out);
  check_launch("transpose");
}

/// Four values a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bytes_of(const T* __restrict__ x, std::int64_t count, bool words, std::uint8_t* __restrict__ out) {
  const std::int64_t first = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  uchar4 packed{};
  auto* bytes = reinterpret_cast<std::uint8_t*>(&packed);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (first + j >= count) break;
    const float level = 255.0F * ((read(x[first + j]) + 1.0F) / 2.0F);
    bytes[j] = level >= 255.0F ? 255 : level > 0.0F ? static_cast<std::uint8_t>(level) : 0;
    if (!words || first + 4 > count) out[first + j] = bytes[j];
  }
  if (words && first + 4 <= count) *reinterpret_cast<uchar4*>(out + first) = packed;
}

}  // namespace

void upsample_nearest_2x(const void* x, DType type, int batch, int height, int width, int channels, void* out,
                         cudaStream_t stream) {
  if (batch <= 0 || height <= 0 || width <= 0 || channels <= 0) return;
  const std::int64_t rows = std::int64_t{batch} * height;
  const std::int64_t pixel = channels * static_cast<std::int64_t>(size_of(type));
  if (pixel % 16 == 0 && aligned({x, out}))
    double_units<uint4>(x, rows, width, pixel / 16, out, stream);
  else if (pixel % 4 == 0)
    double_units<std::uint32_t>(x, rows, width, pixel / 4, out, stream);
  else
    double_units<std::uint16_t>(x, rows, width, pixel / 2, out, stream);
  check_launch("double_pixels");
}

void planes_to_pixels(const float* x, int batch, int channels, std::int64_t pixels, void* out, DType type,
                      cudaStream_t stream) {
  if (batch <= 0 || channels <= 0 || pixels <= 0) return;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    transpose_pictures(x, batch, channels, pixels, std::numeric_limits<float>::infinity(), static_cast<T*>(out),
                       stream);
  });
}

void pixels_to_planes(const void* x, DType type, int batch, int channels, std::int64_t pixels, float limit, float* out,
                      cudaStream_t stream) {
  if (batch <= 0 || channels <= 0 || pixels <= 0) return;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x);
    if (channels > 8) return transpose_pictures(from, batch, pixels, channels, limit, out, stream);
    const std::int64_t all_pixels = batch * pixels;
    split_pixels<T>
        <<<blocks_for(all_pixels, kThreads), kThreads, 0, stream>>>(from, all_pixels, pixels, channels, limit, out);
    check_launch("split_pixels");
  });
}

void to_bytes(const void* x, DType type, std::int64_t count, std::uint8_t* out, cudaStream_t stream) {
  if (count <= 0) return;
  const bool words = reinterpret_cast<std::uintptr_t>(out) % 4 == 0;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    bytes_of<T><<<blocks_for(count, kThreads * 4), kThreads, 0, stream>>>(static_cast<const T*>(x), count, words, out);
    check_launch("bytes_of");
  });
}

}  // namespace sparvar::cuda
