#include "bits/sampling.h"

#include <gtest/gtest.h>

#include <cmath>

#include "support.h"

namespace sparvar {
namespace {

// Known answers of Random123's kat_vectors for philox4x32-10.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox({0, 0, 0, 0}, 0), (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0U, ~0U, ~0U, ~0U}, ~0ULL),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822ULL),
            (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(UniformDraw, EveryIndexMatters) {
  const float base = uniform_draw(1, 2, 3, 4, 5);
  EXPECT_NE(base, uniform_draw(2, 2, 3, 4, 5));
  EXPECT_NE(base, uniform_draw(1, 3, 3, 4, 5));
  EXPECT_NE(base, uniform_draw(1, 2, 4, 4, 5));
  EXPECT_NE(base, uniform_draw(1, 2, 3, 5, 5));
  EXPECT_NE(base, uniform_draw(1, 2, 3, 4, 6));
  EXPECT_GE(base, 0.0F);
  EXPECT_LT(base, 1.0F);
}

/// Pairs (0, x): the second value has probability sigmoid(x).
Tensor pairs(const std::vector<float>& x) {
  std::vector<float> values;
  for (const float v : x) values.insert(values.end(), {0.0F, v});
  return Tensor::from(values, {1, 1, static_cast<std::int64_t>(values.size())});
}

TEST(SamplingWords, KeepWhatTheyAreMadeOf) {
  const SamplingWords words({.seed = ~0ULL, .top_p = 0.9F}, 1ULL << 40);
  const SamplingWords copy = SamplingWords::from(words.to_tensor());
  EXPECT_EQ(copy.seed, ~0ULL);
  EXPECT_EQ(copy.first_picture, 1ULL << 40);
  EXPECT_FALSE(copy.greedy);
  EXPECT_EQ(copy.rarest, 1.0F - 0.9F);
}

TEST(SampleBits, GreedyTakesTheLarger) {
  for (const Sampling& sampling : {Sampling{.greedy = true}, Sampling{.top_k = 1}}) {
    const Tensor bits = sample_bits(pairs({-0.01F, 0.01F, 5, -5}), {sampling, 0}, 0);
    EXPECT_EQ(std::vector<int>(bits.data<std::uint8_t>(), bits.data<std::uint8_t>() + 4),
              (std::vector<int>{0, 1, 1, 0}));
  }
}

TEST(SampleBits, TopPMakesRareValuesImpossible) {
  const float at_3_percent = std::log(0.97F / 0.03F);
  std::int64_t rare_with = 0, rare_without = 0;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const Tensor logits = pairs({at_3_percent + 0.01F, -at_3_percent - 0.01F});
    const Tensor cut = sample_bits(logits, {Sampling{.seed = seed, .top_p = 0.97F}, 0}, 0);
    const Tensor all = sample_bits(logits, {Sampling{.seed = seed, .top_p = 0.0F}, 0}, 0);
    rare_with += (cut.data<std::uint8_t>()[0] == 0) + (cut.data<std::uint8_t>()[1] == 1);
    rare_without += (all.data<std::uint8_t>()[0] == 0) + (all.data<std::uint8_t>()[1] == 1);
  }
  EXPECT_EQ(rare_with, 0);
  EXPECT_NEAR(static_cast<double>(rare_without) / 4000, 0.03, 0.012);
}

TEST(SampleBits, FrequenciesFollowTheLogits) {
  for (const float p : {0.1F, 0.5F, 0.8F}) {
    Tensor logits = Tensor::empty(DType::f32, {2, 2000, 8});
    for (std::int64_t i = 0; i < logits.size(); i += 2) {
      logits.data<float>()[i] = 0;
      logits.data<float>()[i + 1] = std::log(p / (1 - p));
    }
    const Tensor bits = sample_bits(logits, {Sampling{.seed = 11}, 0}, 3);
    double ones = 0;
    for (std::int64_t i = 0; i < bits.size(); ++i) ones += bits.data<std::uint8_t>()[i];
    EXPECT_NEAR(ones / static_cast<double>(bits.size()), p, 0.02);
  }
}

TEST(SampleBits, BatchDoesNotChangeTheDraws) {
  const Tensor logits = testing::random_tensor({3, 70, 26}, 5);
  const Sampling sampling{.seed = 0xfedcba9876543210ULL, .top_p = 0.0F};
  const Tensor together = sample_bits(logits, {sampling, 40}, 7);
  for (int i = 0; i < 3; ++i) {
    const Tensor alone = sample_bits(logits.rows(i, i + 1), {sampling, 40 + static_cast<std::uint64_t>(i)}, 7);
    EXPECT_EQ(testing::max_difference(alone, together.rows(i, i + 1)), 0) << "picture " << i;
  }
}

TEST(SampleBits, EveryBitUsesItsOwnDraw) {
  const Tensor logits = testing::random_tensor({2, 9, 14}, 6, 0.3F);
  const Tensor bits = sample_bits(logits, {Sampling{.seed = 3, .top_p = 0.0F}, 100}, 2);
  for (int b = 0; b < 2; ++b)
    for (int t = 0; t < 9; ++t)
      for (int bit = 0; bit < 7; ++bit) {
        const float* pair = logits.data<float>() + ((b * 9 + t) * 7 + bit) * 2;
        const bool expected = uniform_draw(3, 100 + b, 2, t, bit) < 1.0F / (1.0F + std::exp(pair[0] - pair[1]));
        EXPECT_EQ(bits.data<std::uint8_t>()[(b * 9 + t) * 7 + bit], expected ? 1 : 0);
      }
}

}  // namespace
}  // namespace sparvar
