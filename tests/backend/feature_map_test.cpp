// Group norm and upsampling against the definitions, in double precision, for every instruction set this machine has.
#include <gtest/gtest.h>
#include <omp.h>

#include "backend/backend.h"
#include "backend/cpu/attention/kernels.h"
#include "backend/device_under_test.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

/// Runs a test once per instruction set, and puts the fastest back.
class FeatureMap : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!select_attention_kernels(GetParam())) GTEST_SKIP() << "this machine has no " << GetParam();
  }
  void TearDown() override { select_attention_kernels(""); }
};

struct NormCase {
  std::int64_t batch, height, width, channels;
  int groups;
  float offset = 0;  // added to every value: a mean far from zero
};

/// Affine group norm of element (b, p, c), then SiLU where asked.
std::vector<double> reference(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, double eps,
                              bool silu) {
  const std::int64_t channels = x.dim(3);
  const std::int64_t pixels = x.dim(1) * x.dim(2);
  const std::int64_t width = channels / groups;
  std::vector<double> out(static_cast<std::size_t>(x.size()));
  const auto at = [&](std::int64_t b, std::int64_t p, std::int64_t c) { return (b * pixels + p) * channels + c; };
  for (std::int64_t b = 0; b < x.dim(0); ++b)
    for (int g = 0; g < groups; ++g) {
      double mean = 0;
      double variance = 0;
      for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t c = g * width; c < (g + 1) * width; ++c) mean += x.data<float>()[at(b, p, c)];
      mean /= static_cast<double>(width * pixels);
      for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t c = g * width; c < (g + 1) * width; ++c)
          variance += std::pow(x.data<float>()[at(b, p, c)] - mean, 2);
      variance /= static_cast<double>(width * pixels);
      for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t c = g * width; c < (g + 1) * width; ++c) {
          const double y = (x.data<float>()[at(b, p, c)] - mean) / std::sqrt(variance + eps) * weight.data<float>()[c] +
                           bias.data<float>()[c];
          out[static_cast<std::size_t>(at(b, p, c))] = silu ? y / (1 + std::exp(-y)) : y;
        }
    }
  return out;
}

/// Largest error in units of `tolerance` (absolute, and relative to the value), plus one rounding where bf16.
double worst_error(const Tensor& got, const std::vector<double>& want, double tolerance) {
  const double rounding = got.dtype() == DType::bf16 ? std::ldexp(1.0, -8) : 0.0;
  const Tensor values = got.to(DType::f32);
  double worst = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double allowed = tolerance + (tolerance + rounding) * std::abs(want[i]);
    const double error = std::abs(values.data<float>()[i] - want[i]) / allowed;
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

Tensor input(const NormCase& c, DType type, unsigned seed) {
  Tensor x = testing::random_tensor({c.batch, c.height, c.width, c.channels}, seed, 2.0F);
  for (std::int64_t i = 0; i < x.size(); ++i) x.data<float>()[i] += c.offset;
  return x.to(type);
}

TEST_P(FeatureMap, GroupNormMatchesTheDefinition) {
  const std::vector<NormCase> cases = {{1, 7, 5, 32, 8},  {2, 9, 3, 32, 32},  {1, 65, 67, 16, 8},  {3, 1, 1, 24, 4},
                                       {1, 13, 11, 6, 3}, {1, 3, 5, 320, 32}, {2, 33, 31, 128, 8}, {1, 5, 5, 1, 1}};
  const auto backend = testing::make_backend(DType::f32, 0);
  unsigned seed = 10;
  for (const NormCase& c : cases) {
    const Tensor weight = testing::random_tensor({c.channels}, ++seed);
    const Tensor bias = testing::random_tensor({c.channels}, ++seed);
    for (const DType type : {DType::f32, DType::bf16})
      for (const bool silu : {false, true}) {
        const Tensor x = input(c, type, ++seed);
        const Tensor got = backend->group_norm(x, c.groups, weight, bias, 1e-6F, silu);
        ASSERT_EQ(got.dtype(), type);
        ASSERT_EQ(got.shape(), x.shape());
        EXPECT_LE(worst_error(got, reference(x.to(DType::f32), c.groups, weight, bias, 1e-6, silu), 2e-6), 1.0)
            << to_string(x.shape()) << " " << name_of(type) << (silu ? " silu" : "");
      }
  }
}

// Sums of a quarter of a million values: f32 running sums would be off by 1e-3 here.
TEST_P(FeatureMap, GroupNormOfALargeMapWithALargeMeanIsExact) {
  const NormCase c{1, 512, 512, 16, 8, 20.0F};
  const auto backend = testing::make_backend(DType::f32, 0);
  const Tensor x = input(c, DType::f32, 77);
  const Tensor weight = testing::random_tensor({16}, 78);
  const Tensor bias = testing::random_tensor({16}, 79);
  const Tensor got = backend->group_norm(x, 8, weight, bias, 1e-6F, false);
  // x * scale loses mean / deviation = 10 times the rounding of one number.
  EXPECT_LE(worst_error(got, reference(x, 8, weight, bias, 1e-6, false), 4e-6), 1.0);
}

TEST_P(FeatureMap, SiluIsRightFarFromZero) {
  const auto backend = testing::make_backend(DType::f32, 0);
  // Two values of opposite sign normalise to +-1, so the weight is the argument of SiLU.
  const Tensor x = Tensor::from({-1, -1, -1, 1, 1, 1}, {1, 2, 1, 3});
  const Tensor bias = Tensor::zeros(DType::f32, {3});
  for (const float scale : {1e-3F, 1.0F, 10.0F, 30.0F, 86.0F, 100.0F, 1e4F}) {
    const Tensor weight = Tensor::from({scale, scale, scale}, {3});
    const Tensor got = backend->group_norm(x, 3, weight, bias, 0.0F, true);
    for (const auto& [index, y] : {std::pair{0, -static_cast<double>(scale)}, {3, static_cast<double>(scale)}}) {
      const double want = y / (1 + std::exp(-y));
      EXPECT_NEAR(got.data<float>()[index], want, 4e-7 * std::abs(want) + 1e-30) << y;
    }
  }
}

TEST_P(FeatureMap, NotANumberStaysOne) {
  const auto backend = testing::make_backend(DType::bf16, 0);
  Tensor x = testing::random_tensor({1, 4, 4, 8}, 5);
  x.data<float>()[0] = NAN;  // of group 0
  const Tensor ones = testing::random_tensor({8}, 6);
  const Tensor got = backend->group_norm(x.to(DType::bf16), 2, ones, ones, 1e-6F, true).to(DType::f32);
  EXPECT_TRUE(std::isnan(got.data<float>()[8]));
  EXPECT_FALSE(std::isnan(got.data<float>()[12]));
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, FeatureMap, ::testing::Values("generic", "avx2", "avx512"));

TEST(GroupNorm, DoesNotDependOnTheNumberOfThreads) {
  const Tensor x = testing::random_tensor({1, 300, 301, 16}, 3);
  const Tensor w = testing::random_tensor({16}, 4);
  const Tensor one = make_cpu_backend({DType::f32, 1})->group_norm(x, 8, w, w, 1e-6F, true);
  const Tensor three = make_cpu_backend({DType::f32, 3})->group_norm(x, 8, w, w, 1e-6F, true);
  omp_set_num_threads(omp_get_num_procs());
  EXPECT_EQ(testing::max_difference(one, three), 0);
}

TEST(GroupNorm, RefusesWhatDoesNotFit) {
  const auto backend = testing::make_backend(DType::f32, 0);
  const Tensor x = testing::random_tensor({1, 4, 4, 8}, 1);
  const Tensor w = testing::random_tensor({8}, 2);
  EXPECT_THROW(backend->group_norm(x, 3, w, w, 1e-6F, true), Error);
  EXPECT_THROW(backend->group_norm(x, 0, w, w, 1e-6F, true), Error);
  EXPECT_THROW(backend->group_norm(x, 4, w, testing::random_tensor({7}, 2), 1e-6F, true), Error);
  EXPECT_THROW(backend->group_norm(x.reshaped({4, 4, 8}), 4, w, w, 1e-6F, true), Error);
}

TEST(Upsample, RepeatsEveryPixel) {
  const auto backend = testing::make_backend(DType::f32, 0);
  for (const Shape& shape : {Shape{1, 3, 5, 16}, Shape{2, 4, 1, 7}, Shape{1, 9, 8, 1}, Shape{1, 2, 3, 48}})
    for (const DType type : {DType::f32, DType::bf16}) {
      const Tensor x = testing::random_tensor(shape, 9).to(type);
      const Tensor got = backend->upsample_nearest_2x(x);
      ASSERT_EQ(got.dtype(), type);
      ASSERT_EQ(got.shape(), (Shape{shape[0], 2 * shape[1], 2 * shape[2], shape[3]}));
      const Tensor from = x.to(DType::f32);
      const Tensor to = got.to(DType::f32);
      for (std::int64_t i = 0; i < to.size(); ++i) {
        const std::int64_t c = i % shape[3];
        const std::int64_t px = i / shape[3] % (2 * shape[2]);
        const std::int64_t py = i / shape[3] / (2 * shape[2]);  // over all pictures: both are even
        ASSERT_EQ(to.data<float>()[i], from.data<float>()[(py / 2 * shape[2] + px / 2) * shape[3] + c]) << i;
      }
    }
}

}  // namespace
}  // namespace sparvar
