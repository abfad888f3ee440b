// Bits from logits. Every draw is a function of (seed, picture, scale, token, bit) alone: threads, batch and device do
// not change it.
#pragma once

#include <array>
#include <cstdint>

#include "core/tensor.h"

namespace sparvar {

/// Philox 4x32-10 (Salmon et al., SC 2011): four random words of a 128-bit counter and a 64-bit key.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key);

/// The uniform number in [0, 1) of one bit: counter (token, scale * 2^16 + bit / 4, picture), word bit % 4, upper 24
/// bits.
float uniform_draw(std::uint64_t seed, std::uint64_t picture, int scale, int token, int bit);

struct Sampling {
  std::uint64_t seed = 0;
  int top_k = 0;        // 1: arg-max
  float top_p = 0.97F;  // a bit whose rarer value has p <= 1 - top_p takes the other; 0: off
  bool greedy = false;  // arg-max
};

/// Sampling as four 64-bit words, so that a device can read what changes from picture to picture: seed, number of the
/// batch's first picture, greedy (0 or 1), and the bits of the float `rarest` (1 - top_p; -1: off).
struct SamplingWords {
  std::uint64_t seed = 0;
  std::uint64_t first_picture = 0;
  bool greedy = false;
  float rarest = -1.0F;

  SamplingWords() = default;
  SamplingWords(const Sampling& sampling, std::uint64_t first);
  static SamplingWords from(const Tensor& words);  // I64 [4], on the host
  Tensor to_tensor() const;
};

/// logits f32 [B, n, 2 * bits] -> U8 [B, n, bits]; picture i of the batch draws as picture first_picture + i.
Tensor sample_bits(const Tensor& logits, const SamplingWords& sampling, int scale);

}  // namespace sparvar
