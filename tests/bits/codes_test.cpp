// Resizing, codes and quantisation against their definitions, and against upstream's tensors.
#include "bits/codes.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "sparvar/error.h"
#include "visual/fixture.h"

namespace sparvar {
namespace {

using testing::Fixture;
using testing::max_difference;
using testing::random_tensor;

/// Weight of input `i` in output `o` of a bilinear resize of one axis.
double bilinear_weight(std::int64_t in, std::int64_t out, std::int64_t o, std::int64_t i) {
  const double centre =
      std::max(0.0, (static_cast<double>(o) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5);
  const double nearest = std::min(centre, static_cast<double>(in - 1));  // past the last centre the last value holds
  return std::max(0.0, 1.0 - std::abs(nearest - static_cast<double>(i)));
}

/// Weight of input `i` in output `o` of an adaptive average of one axis.
double area_weight(std::int64_t in, std::int64_t out, std::int64_t o, std::int64_t i) {
  const auto begin = static_cast<std::int64_t>(std::floor(static_cast<double>(o * in) / static_cast<double>(out)));
  const auto end = static_cast<std::int64_t>(std::ceil(static_cast<double>((o + 1) * in) / static_cast<double>(out)));
  return i >= begin && i < end ? 1.0 / static_cast<double>(end - begin) : 0.0;
}

template <typename Weight>
Tensor reference_resize(const Tensor& x, Grid to, Weight weight) {
  Tensor out = Tensor::empty(DType::f32, {x.dim(0), x.dim(1), to.h, to.w});
  float* target = out.data<float>();
  for (std::int64_t plane = 0; plane < x.dim(0) * x.dim(1); ++plane)
    for (std::int64_t y = 0; y < to.h; ++y)
      for (std::int64_t z = 0; z < to.w; ++z) {
        double sum = 0;
        for (std::int64_t i = 0; i < x.dim(2); ++i)
          for (std::int64_t j = 0; j < x.dim(3); ++j)
            sum += weight(x.dim(2), to.h, y, i) * weight(x.dim(3), to.w, z, j) *
                   x.data<float>()[(plane * x.dim(2) + i) * x.dim(3) + j];
        *target++ = static_cast<float>(sum);
      }
  return out;
}

struct ResizeCase {
  Grid from, to;
};

const std::vector<ResizeCase> kResizes = {{{1, 1}, {7, 5}},     {{4, 3}, {20, 15}},  {{5, 9}, {8, 3}},
                                          {{16, 12}, {20, 15}}, {{20, 15}, {1, 1}},  {{20, 15}, {12, 9}},
                                          {{7, 7}, {7, 13}},    {{64, 37}, {5, 64}}, {{2, 3}, {2, 3}},
                                          {{13, 1}, {1, 13}},   {{3, 11}, {30, 4}}};

TEST(Resize, BilinearMatchesTheFormulaUpAndDown) {
  unsigned seed = 1;
  // Positions are f32, as upstream's are: at 64 they are rounded to 4e-6, times the step between neighbours.
  for (const auto& [from, to] : kResizes) {
    const Tensor x = random_tensor({2, 3, from.h, from.w}, ++seed);
    EXPECT_LE(max_difference(resize_bilinear(x, to), reference_resize(x, to, bilinear_weight)), 2e-5)
        << from.h << "x" << from.w << " to " << to.h << "x" << to.w;
  }
}

TEST(Resize, AreaMatchesTheFormulaUpAndDown) {
  unsigned seed = 50;
  for (const auto& [from, to] : kResizes) {
    const Tensor x = random_tensor({2, 3, from.h, from.w}, ++seed);
    EXPECT_LE(max_difference(resize_area(x, to), reference_resize(x, to, area_weight)), 1e-6)
        << from.h << "x" << from.w << " to " << to.h << "x" << to.w;
  }
}

TEST(Resize, RefusesWhatIsNoMap) {
  const Tensor map = random_tensor({1, 2, 3, 4}, 1);
  for (const auto resize : {resize_bilinear, resize_area}) {
    EXPECT_THROW(resize(map.reshaped({2, 3, 4}), {2, 2}), Error);
    EXPECT_THROW(resize(map.to(DType::bf16), {2, 2}), Error);
    EXPECT_THROW(resize(map, {0, 2}), Error);
    EXPECT_THROW(resize(Tensor::empty(DType::f32, {1, 2, 0, 4}), {2, 2}), Error);
  }
}

Tensor random_bits(Shape shape, unsigned seed) {
  std::mt19937 generator(seed);
  Tensor bits = Tensor::empty(DType::u8, std::move(shape));
  for (std::int64_t i = 0; i < bits.size(); ++i)
    bits.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(generator() & 1U);
  return bits;
}

TEST(Codes, EveryBitHasItsPlace) {
  const Grid tokens{3, 5};
  const Tensor bits = random_bits({2, 15, 14}, 3);
  const Tensor codes = bits_to_codes(bits, tokens, false);
  ASSERT_EQ(codes.shape(), (Shape{2, 14, 3, 5}));
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t n = 0; n < 15; ++n)
      for (std::int64_t c = 0; c < 14; ++c) {
        const double sign = bits.data<std::uint8_t>()[(b * 15 + n) * 14 + c] != 0 ? 1 : -1;
        ASSERT_NEAR(codes.data<float>()[(b * 14 + c) * 15 + n], sign / std::sqrt(14.0), 1e-7);
      }
}

TEST(Codes, PatchifyShufflesPixels) {
  const Grid tokens{2, 3};
  const Tensor bits = random_bits({2, 6, 56}, 4);
  const Tensor codes = bits_to_codes(bits, tokens, true);
  ASSERT_EQ(codes.shape(), (Shape{2, 14, 4, 6}));
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t c = 0; c < 14; ++c)
      for (std::int64_t y = 0; y < 4; ++y)
        for (std::int64_t x = 0; x < 6; ++x) {
          const std::int64_t word = (b * 6 + (y / 2) * 3 + x / 2) * 56 + 4 * c + 2 * (y % 2) + x % 2;
          const double sign = bits.data<std::uint8_t>()[word] != 0 ? 1 : -1;
          ASSERT_NEAR(codes.data<float>()[((b * 14 + c) * 4 + y) * 6 + x], sign / std::sqrt(14.0), 1e-7);
        }
}

TEST(Codes, WordsOfTheSameGridAreTheBits) {
  for (const bool patchify : {false, true}) {
    const Tensor bits = random_bits({3, 35, 32}, 5);
    const Tensor words = codes_to_words(bits_to_codes(bits, {7, 5}, patchify), {7, 5}, patchify);
    ASSERT_EQ(words.shape(), bits.shape());
    for (std::int64_t i = 0; i < bits.size(); ++i)
      ASSERT_EQ(words.data<float>()[i] > 0, bits.data<std::uint8_t>()[i] != 0) << i;
  }
}

TEST(Codes, RefusesBitsThatDoNotFit) {
  EXPECT_THROW(bits_to_codes(random_bits({1, 6, 8}, 1), {2, 4}, false), Error);
  EXPECT_THROW(bits_to_codes(random_bits({1, 6, 6}, 1), {2, 3}, true), Error);
  EXPECT_THROW(bits_to_codes(random_tensor({1, 6, 8}, 1), {2, 3}, false), Error);
  EXPECT_THROW(codes_to_words(random_tensor({1, 6, 8}, 1), {2, 3}, false), Error);
}

/// Upstream's generation loop: bits of each scale, summed on the last grid, resized for the next scale.
void compare_loop(const std::string& name, bool patchify) {
  const Fixture fixture(name);
  const TensorFile io = fixture.open("io.safetensors");
  const ScaleSchedule schedule = fixture.schedule();
  const Grid last = patchify ? Grid{2 * schedule.back().h, 2 * schedule.back().w} : schedule.back();
  Tensor summed;
  int compared = 0;
  for (std::size_t k = 0; k < schedule.size(); ++k) {
    const std::string scale = ".s" + std::to_string(k);
    if (k > 0 && io.has("next_features" + scale)) {
      EXPECT_LE(max_difference(codes_to_words(summed, schedule[k], patchify), io.get("next_features" + scale)), 5e-6)
          << k;
      ++compared;
    }
    const Tensor codes = resize_bilinear(bits_to_codes(io.get("bits" + scale), schedule[k], patchify), last);
    if (k == 0)
      summed = codes.to(DType::f32);
    else
      for (std::int64_t i = 0; i < summed.size(); ++i) summed.data<float>()[i] += codes.data<float>()[i];
    if (!io.has("summed_codes" + scale)) continue;
    EXPECT_LE(max_difference(summed, io.get("summed_codes" + scale)), 5e-6) << k;
    ++compared;
  }
  EXPECT_GE(compared, 4);
}

TEST(Codes, MatchUpstreamsLoop) { compare_loop("infinity-tiny-f16", false); }
TEST(Codes, MatchUpstreamsLoopWithPatchify) { compare_loop("infinity-tiny-patchify", true); }

TEST(Quantize, MatchesUpstream) {
  const Fixture fixture("bsq-vae");
  const TensorFile io = fixture.open("io.safetensors");
  const ScaleSchedule schedule = fixture.schedule();
  const Quantized got = quantize(io.get("encoder_features"), schedule);
  ASSERT_EQ(got.bits.size(), schedule.size());
  int compared = 0;
  for (std::size_t k = 0; k < schedule.size(); ++k) {
    const std::string scale = ".s" + std::to_string(k);
    ASSERT_EQ(got.bits[k].shape(), io.get("bits" + scale).shape());
    EXPECT_EQ(max_difference(got.bits[k], io.get("bits" + scale)), 0) << k;
    for (const auto& [tensor, expected] :
         {std::pair{&got.residual[k], "residual_resized" + scale}, {&got.var_input[k], "var_input" + scale}}) {
      if (!io.has(expected)) continue;
      ASSERT_EQ(tensor->shape(), io.get(expected).shape());
      EXPECT_LE(max_difference(*tensor, io.get(expected)), 1.5e-6) << expected;
      ++compared;
    }
  }
  EXPECT_GE(compared, 10);
  EXPECT_LE(max_difference(got.sum, io.get("quantized_sum")), 1.5e-6);
}

TEST(Quantize, BitsRebuildTheSum) {
  const ScaleSchedule schedule = {{1, 1}, {2, 3}, {3, 5}, {6, 10}};
  const Tensor features = random_tensor({1, 12, 6, 10}, 8);
  const Quantized got = quantize(features, schedule);
  Tensor summed = Tensor::zeros(DType::f32, features.shape());
  for (std::size_t k = 0; k < schedule.size(); ++k) {
    EXPECT_EQ(max_difference(got.var_input[k], resize_area(summed, schedule[k])), 0) << k;
    const Tensor bits = got.bits[k].reshaped({1, schedule[k].tokens(), 12});
    const Tensor codes = resize_bilinear(bits_to_codes(bits, schedule[k], false), {6, 10});
    for (std::int64_t i = 0; i < summed.size(); ++i) summed.data<float>()[i] += codes.data<float>()[i];
  }
  EXPECT_EQ(max_difference(got.sum, summed), 0);
}

TEST(Quantize, ZeroCountsAsNegative) {
  const Quantized got = quantize(Tensor::zeros(DType::f32, {1, 4, 1, 1}), {{1, 1}});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(got.bits[0].data<std::uint8_t>()[i], 0);
}

TEST(Quantize, RefusesWhatDoesNotFit) {
  EXPECT_THROW(quantize(random_tensor({2, 4, 2, 2}, 1), {{1, 1}}), Error);
  EXPECT_THROW(quantize(random_tensor({1, 4, 2, 2}, 1), {}), Error);
  EXPECT_THROW(quantize(random_tensor({1, 4, 2, 2}, 1), {{1, 1}, {0, 2}}), Error);
}

}  // namespace
}  // namespace sparvar
