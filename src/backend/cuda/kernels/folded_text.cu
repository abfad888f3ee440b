#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/folded_text.h"

namespace sparvar::cuda {
namespace {

constexpr int kWarps = 8;

/// A warp to a token of a head.
__global__ void __launch_bounds__(32 * kWarps) spread(const SpreadText a) {
  let_next_start();
  wait_for_earlier();
  const std::int64_t place = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;  // (text, head, token)
  if (place >= std::int64_t{a.texts} * a.heads * a.length) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto token = static_cast<int>(place % a.length);
  const auto head = static_cast<int>(place / a.length % a.heads);
  const auto text = static_cast<int>(place / a.length / a.heads);
  const int begin = a.cu_lengths[text];
  const bool is_there = token < a.cu_lengths[text + 1] - begin;
  const std::int64_t width = std::int64_t{a.heads} * a.dim;
  const auto* const from = static_cast<const bf16*>(a.kv) + (begin + token) * 2 * width + std::int64_t{head} * a.dim;
  auto* const keys = static_cast<bf16*>(a.keys) + place * a.dim;
  auto* const values = static_cast<bf16*>(a.values) + place * a.dim;
  const bf16 zero = __float2bfloat16(0.0F);
  float sum = 0;
  for (int d = lane; d < a.dim; d += 32) {
    const bf16 key = is_there ? from[d] : zero;
    keys[d] = key;
    values[d] = is_there ? from[width + d] : zero;
    if (a.query_bias != nullptr) sum += read(key) * a.query_bias[head * a.dim + d];
  }
  sum = warp_sum(sum);
  if (lane == 0) a.bias[place] = sum;
}

/// A warp to a head of a row; kEach tokens to a lane.
template <int kEach>
__global__ void __launch_bounds__(32 * kWarps) softmax(const SoftmaxOfText a) {
  let_next_start();
  wait_for_earlier();
  const std::int64_t place = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;  // (text, row, head)
  if (place >= a.texts * a.rows * a.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto head = static_cast<int>(place % a.heads);
  const auto text = static_cast<int>(place / a.heads / a.rows);
  const int length = min(a.cu_lengths[text + 1] - a.cu_lengths[text], a.length);
  const float* const logits = a.logits + place * a.length;
  const float* const bias = a.bias + (std::int64_t{text} * a.heads + head) * a.length;
  float x[kEach];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = lane + 32 * i;
    x[i] = token < length ? a.scale * (__ldcg(logits + token) + __ldg(bias + token)) : -INFINITY;
    largest = fmaxf(largest, x[i]);
  }
  largest = warp_max(largest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = lane + 32 * i < length ? __expf(x[i] - largest) : 0.0F;
    sum += x[i];
  }
  sum = warp_sum(sum);
  const float share = length > 0 ? 1.0F / sum : 0.0F;
  auto* const weights = static_cast<bf16*>(a.weights) + place * a.length;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = lane + 32 * i;
    if (token < a.length) weights[token] = __float2bfloat16(x[i] * share);
  }
}

}  // namespace

void spread_text(const SpreadText& args, cudaStream_t stream) {
  const std::int64_t places = std::int64_t{args.texts} * args.heads * args.length;
  if (places <= 0) return;
  launch_early(spread, blocks_for(places, kWarps), 32 * kWarps, 0, stream, 1, args);
  check_launch("texts of one length");
}

void softmax_of_text(const SoftmaxOfText& args, cudaStream_t stream) {
  const std::int64_t places = args.texts * args.rows * args.heads;
  if (places <= 0) return;
  if (args.length > SoftmaxOfText::kLongest) throw Error(ErrorKind::usage, "this text is too long to be folded");
  const unsigned blocks = blocks_for(places, kWarps);
  const auto launch = [&](auto kernel) { launch_early(kernel, blocks, 32 * kWarps, 0, stream, 1, args); };
  if (args.length <= 32)
    launch(softmax<1>);
  else if (args.length <= 64)
    launch(softmax<2>);
  else
    launch(softmax<SoftmaxOfText::kLongest / 32>);
  check_launch("softmax of a text");
}

}  // namespace sparvar::cuda
