// What a walk does between the layers: modulation, guidance, bits and codes, copies.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "bits/codes.h"
#include "bits/sampling.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::max_difference;
using testing::random_tensor;

class WalkOps : public ::testing::TestWithParam<DType> {
 protected:
  std::unique_ptr<Backend> backend = testing::make_backend(GetParam());
  unsigned seed = std::random_device{}();
};

TEST_P(WalkOps, ModulationPutsThePartsFirst) {
  for (const std::int64_t width : {7L, 64L}) {
    const Tensor shared = random_tensor({3, 6 * width}, seed), own = random_tensor({6, width}, seed + 1);
    for (const bool with_own : {true, false}) {
      const Tensor found = backend->modulation(shared, with_own ? own : Tensor(), 6);
      ASSERT_EQ(found.shape(), (Shape{6, 3, width}));
      for (std::int64_t i = 0; i < found.size(); ++i) {
        const std::int64_t part = i / (3 * width), row = i / width % 3, c = i % width;
        const float want = shared.data<float>()[(row * 6 + part) * width + c] +
                           (with_own ? own.data<float>()[part * width + c] : 0.0F);
        ASSERT_EQ(found.data<float>()[i], want) << i;
      }
    }
  }
}

TEST_P(WalkOps, GuidanceMixesTheHalves) {
  const Tensor start = random_tensor({4, 5, 9}, seed);
  for (const float cfg : {1.0F, 3.5F}) {
    const Tensor guidance = Tensor::from({cfg, 1 / 0.7F}, {1, 2});
    Tensor x = start.to(DType::f32);
    backend->guide_hidden(x, guidance);
    const Tensor logits = backend->guide_logits(start, 2, guidance);
    const Tensor alone = backend->guide_logits(start, 4, guidance);
    for (std::int64_t i = 0; i < 90; ++i) {
      const double a = start.data<float>()[i], b = start.data<float>()[90 + i];
      const double mixed = cfg * a + (1 - cfg) * b;
      EXPECT_NEAR(x.data<float>()[i], cfg == 1 ? a : mixed, 1e-5);
      EXPECT_NEAR(x.data<float>()[90 + i], cfg == 1 ? b : mixed, 1e-5);
      EXPECT_NEAR(logits.data<float>()[i], mixed / 0.7, 1e-5);
      EXPECT_NEAR(alone.data<float>()[90 + i], b / 0.7, 1e-5);
    }
  }
}

// The same draws on every device: only a bit whose draw is within rounding of its probability may differ.
TEST_P(WalkOps, BitsAreTheSameOnEveryDevice) {
  std::int64_t differing = 0, total = 0;
  for (const auto& [tokens, bits] : {std::pair{1L, 16L}, std::pair{37L, 14L}, std::pair{400L, 56L}})
    for (const Sampling& sampling :
         {Sampling{.seed = 9}, Sampling{.seed = ~0ULL, .top_p = 0.0F}, Sampling{.seed = 5, .greedy = true}}) {
      const Tensor logits = random_tensor({2, tokens, 2 * bits}, ++seed, 2.0F);
      const SamplingWords words(sampling, (1ULL << 33) + 3);
      const Tensor found = backend->sample_bits(logits, words.to_tensor(), 7);
      const Tensor want = sample_bits(logits, words, 7);
      ASSERT_EQ(found.shape(), want.shape());
      for (std::int64_t i = 0; i < want.size(); ++i)
        differing += found.data<std::uint8_t>()[i] != want.data<std::uint8_t>()[i];
      total += want.size();
    }
  EXPECT_LE(differing, total / 50000) << total;
}

TEST_P(WalkOps, CodesAndWordsAreThoseOfTheHost) {
  struct Case {
    Grid tokens, full;
    std::int64_t channels;
    bool patchify;
  };
  for (const Case& c : {Case{{3, 5}, {12, 20}, 16, false}, Case{{1, 1}, {7, 4}, 14, false},
                        Case{{4, 3}, {18, 10}, 14, true}, Case{{6, 6}, {12, 12}, 3, true}}) {
    const std::int64_t width = c.channels * (c.patchify ? 4 : 1);
    Tensor bits = Tensor::empty(DType::u8, {2, c.tokens.tokens(), width});
    const Tensor noise = random_tensor(bits.shape(), ++seed);
    for (std::int64_t i = 0; i < bits.size(); ++i) bits.data<std::uint8_t>()[i] = noise.data<float>()[i] > 0 ? 1 : 0;
    const Tensor start = random_tensor({2, c.channels, c.full.h, c.full.w}, ++seed);
    Tensor summed = start.to(DType::f32);
    backend->add_codes(summed, bits, c.tokens, c.patchify);
    const Tensor codes = resize_bilinear(bits_to_codes(bits, c.tokens, c.patchify), c.full);
    Tensor want = start.to(DType::f32);
    for (std::int64_t i = 0; i < want.size(); ++i) want.data<float>()[i] += codes.data<float>()[i];
    EXPECT_LT(max_difference(summed, want), 1e-6);
    const Grid next{c.tokens.h + 2, c.tokens.w + 1};
    EXPECT_LT(max_difference(backend->codes_to_words(start, next, c.patchify), codes_to_words(start, next, c.patchify)),
              1e-6);
  }
}

TEST_P(WalkOps, CopiesAreCopies) {
  const Tensor x = random_tensor({2, 3, 5, 8}, seed).to(GetParam());
  EXPECT_EQ(max_difference(backend->clone(x), x), 0);
  const Tensor twice = backend->repeat(x, 2);
  ASSERT_EQ(twice.shape(), (Shape{4, 3, 5, 8}));
  EXPECT_EQ(max_difference(twice.rows(0, 2), x) + max_difference(twice.rows(2, 4), x), 0);
  const Tensor larger = backend->grown(x, 4);
  ASSERT_EQ(larger.shape(), (Shape{2, 3, 9, 8}));
  for (std::int64_t head = 0; head < 6; ++head)
    EXPECT_EQ(max_difference(larger.reshaped({54, 8}).rows(9 * head, 9 * head + 5),
                             x.reshaped({30, 8}).rows(5 * head, 5 * head + 5)),
              0);
  Tensor zero = x.to(DType::f32);
  backend->fill_zero(zero);
  EXPECT_EQ(max_difference(zero, Tensor::zeros(DType::f32, x.shape())), 0);
}

TEST_P(WalkOps, RandomNumbersAreNormal) {
  const Tensor x = backend->random(GetParam(), {100001}, 4, 0.5F).to(DType::f32);
  double sum = 0, squares = 0;
  for (std::int64_t i = 0; i < x.size(); ++i) {
    sum += x.data<float>()[i];
    squares += static_cast<double>(x.data<float>()[i]) * x.data<float>()[i];
  }
  EXPECT_NEAR(sum / 100001, 0, 0.01);
  EXPECT_NEAR(squares / 100001, 0.25, 0.01);
}

TEST_P(WalkOps, FusedNormIsAddAndNorm) {
  for (const std::int64_t width : {5L, 64L, 3584L}) {
    const Tensor start = random_tensor({2, 7, width}, ++seed), y = random_tensor({2, 7, width}, ++seed).to(GetParam()),
                 gate = random_tensor({2, width}, ++seed), scale = random_tensor({2, width}, ++seed),
                 shift = random_tensor({2, width}, ++seed);
    Tensor together = start.to(DType::f32), apart = start.to(DType::f32);
    const NormArgs args{scale, shift, 1.0F, 1e-6F, DType::f32};
    const Tensor found = backend->add_gated_norm(together, y, gate, args);
    backend->add_gated(apart, y, gate);
    EXPECT_LT(max_difference(together, apart), 1e-6);
    EXPECT_LT(max_difference(found, backend->layer_norm(apart, args)), 2e-5);
  }
}

TEST_P(WalkOps, MapsChangeTheirOrder) {
  const Tensor planes = random_tensor({2, 5, 3, 4}, seed, 2.0F);
  const Tensor pixels = backend->to_nhwc(planes);
  ASSERT_EQ(pixels.shape(), (Shape{2, 3, 4, 5}));
  EXPECT_EQ(pixels.data<float>()[(1 * 12 + 7) * 5 + 3], planes.data<float>()[(1 * 5 + 3) * 12 + 7]);
  EXPECT_EQ(max_difference(backend->to_nchw(pixels, INFINITY), planes), 0);
  const Tensor clamped = backend->to_nchw(pixels, 1.0F);
  for (std::int64_t i = 0; i < planes.size(); ++i)
    ASSERT_EQ(clamped.data<float>()[i], std::clamp(planes.data<float>()[i], -1.0F, 1.0F));
}

TEST_P(WalkOps, BytesAreTruncated) {
  const Tensor x = Tensor::from({-1, 1, 0, 0.999F, 1.5F, -3, -0.5F, 0.5F, 0.25F, -0.25F, NAN, 0.1F}, {1, 2, 2, 3});
  const Tensor bytes = backend->to_bytes(x);
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const float value = x.data<float>()[i];
    const double level = std::isnan(value) ? 0 : std::floor(255 * (static_cast<double>(value) + 1) / 2);
    EXPECT_EQ(bytes.data<std::uint8_t>()[i], std::clamp(level, 0.0, 255.0)) << value;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, WalkOps, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& one) { return std::string(name_of(one.param)); });

}  // namespace
}  // namespace sparvar
