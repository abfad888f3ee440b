// Convolutions of feature maps in f32, for comparing with references: implicit matrix products as in convolution.cu, on
// ordinary arithmetic units. A block makes 64 output pixels by 64 channels, a thread 4 by 4 of them.
#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;  // of one stage
constexpr int kThreads = 256;
constexpr int kEach = 4;  // pixels and channels of a thread

/// Element (tap, channel) = `at` of the neighbourhood of an output pixel; zero off the map.
__device__ inline float read_pixel(const OwnConvolution& a, std::int64_t pixel, std::int64_t pixels, int at) {
  if (pixel >= pixels || at >= a.kernel * a.kernel * a.in) return 0;
  const int tap = at / a.in;
  const auto column = static_cast<int>(pixel % a.out_width());
  const std::int64_t row = pixel / a.out_width();
  const int y = static_cast<int>(row % a.out_height()) * a.stride - a.pad_begin + tap / a.kernel;
  const int x = column * a.stride - a.pad_begin + tap % a.kernel;
  const int enlarged = a.enlarged ? 1 : 0;
  if (y < 0 || x < 0 || y >= a.height << enlarged || x >= a.width << enlarged) return 0;
  const std::int64_t map = row / a.out_height();
  const std::int64_t source = (map * a.height + (y >> enlarged)) * a.width + (x >> enlarged);
  return static_cast<const float*>(a.x)[source * a.in + at % a.in];
}

__global__ void __launch_bounds__(kThreads) convolve_f32(const OwnConvolution a, std::int64_t pixels) {
  __shared__ float seen[kDepth][kTile + 1];
  __shared__ float weights[kDepth][kTile + 1];
  const std::int64_t first_pixel = std::int64_t{blockIdx.x} * kTile;
  const int first_out = static_cast<int>(blockIdx.y) * kTile;
  const int depth = a.kernel * a.kernel * a.in;
  const int pixel_of_thread = static_cast<int>(threadIdx.x) / (kTile / kEach) * kEach;
  const int out_of_thread = static_cast<int>(threadIdx.x) % (kTile / kEach) * kEach;
  float sum[kEach][kEach] = {};
  for (int begin = 0; begin < depth; begin += kDepth) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int row = i / kDepth;
      const int at = begin + i % kDepth;
      seen[i % kDepth][row] = read_pixel(a, first_pixel + row, pixels, at);
      const bool there = first_out + row < a.out && at < depth;
      weights[i % kDepth][row] =
          there ? static_cast<const float*>(a.w)[std::int64_t{first_out + row} * depth + at] : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          sum[i][j] = fmaf(seen[d][pixel_of_thread + i], weights[d][out_of_thread + j], sum[i][j]);
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const std::int64_t pixel = first_pixel + pixel_of_thread + i;
      const int out = first_out + out_of_thread + j;
      if (pixel >= pixels || out >= a.out) continue;
      const std::int64_t at = pixel * a.out + out;
      const float added = a.residual != nullptr ? static_cast<const float*>(a.residual)[at] : 0.0F;
      static_cast<float*>(a.y)[at] = sum[i][j] + a.bias[out] + added;
    }
}

}  // namespace

void convolution_f32(const OwnConvolution& args, cudaStream_t stream) {
  const std::int64_t pixels = std::int64_t{args.batch} * args.out_height() * args.out_width();
  const dim3 grid(blocks_for(pixels, kTile), blocks_for(args.out, kTile));
  convolve_f32<<<grid, kThreads, 0, stream>>>(args, pixels);
  check_launch("convolution in f32");
}

}  // namespace sparvar::cuda
