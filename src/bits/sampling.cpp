#include "bits/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>

#include "core/parallel.h"

namespace sparvar {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  auto low = static_cast<std::uint32_t>(key);
  auto high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = static_cast<std::uint64_t>(counter[0]) * 0xD2511F53U;
    const std::uint64_t b = static_cast<std::uint64_t>(counter[2]) * 0xCD9E8D57U;
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ low, static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ high, static_cast<std::uint32_t>(a)};
    low += 0x9E3779B9U;
    high += 0xBB67AE85U;
  }
  return counter;
}

namespace {

std::array<std::uint32_t, 4> words_of(std::uint64_t seed, std::uint64_t picture, int scale, int token, int bit) {
  return philox({static_cast<std::uint32_t>(token),
                 (static_cast<std::uint32_t>(scale) << 16) + static_cast<std::uint32_t>(bit / 4),
                 static_cast<std::uint32_t>(picture), static_cast<std::uint32_t>(picture >> 32)},
                seed);
}

float to_uniform(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24F; }

}  // namespace

float uniform_draw(std::uint64_t seed, std::uint64_t picture, int scale, int token, int bit) {
  return to_uniform(words_of(seed, picture, scale, token, bit)[bit % 4]);
}

SamplingWords::SamplingWords(const Sampling& sampling, std::uint64_t first)
    : seed(sampling.seed),
      first_picture(first),
      greedy(sampling.greedy || sampling.top_k == 1),
      rarest(sampling.top_p > 0.0F ? 1.0F - sampling.top_p : -1.0F) {}

SamplingWords SamplingWords::from(const Tensor& words) {
  const auto* word = words.data<std::uint64_t>();
  SamplingWords out;
  out.seed = word[0];
  out.first_picture = word[1];
  out.greedy = word[2] != 0;
  out.rarest = std::bit_cast<float>(static_cast<std::uint32_t>(word[3]));
  return out;
}

Tensor SamplingWords::to_tensor() const {
  Tensor words = Tensor::empty(DType::i64, {4});
  const std::uint64_t values[] = {seed, first_picture, greedy ? 1U : 0U, std::bit_cast<std::uint32_t>(rarest)};
  std::copy(std::begin(values), std::end(values), words.data<std::uint64_t>());
  return words;
}

Tensor sample_bits(const Tensor& logits, const SamplingWords& sampling, int scale) {
  const std::int64_t pictures = logits.dim(0);
  const std::int64_t tokens = logits.dim(1);
  const auto bits = static_cast<int>(logits.dim(2) / 2);
  Tensor out = Tensor::empty(DType::u8, {pictures, tokens, bits});
  parallel_ranges(pictures * tokens, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float* pair = logits.data<float>() + row * 2 * bits;
      std::uint8_t* result = out.data<std::uint8_t>() + row * bits;
      std::array<std::uint32_t, 4> words{};
      for (int bit = 0; bit < bits; ++bit, pair += 2) {
        const bool likely = pair[1] > pair[0];
        if (!sampling.greedy && bit % 4 == 0)
          words = words_of(sampling.seed, sampling.first_picture + static_cast<std::uint64_t>(row / tokens), scale,
                           static_cast<int>(row % tokens), bit);
        const float one = 1.0F / (1.0F + std::exp(pair[0] - pair[1]));
        if (sampling.greedy || (likely ? 1.0F - one : one) <= sampling.rarest)
          result[bit] = likely ? 1 : 0;
        else
          result[bit] = to_uniform(words[bit % 4]) < one ? 1 : 0;
      }
    }
  });
  return out;
}

}  // namespace sparvar
