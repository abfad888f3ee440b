// Convolutions against the definition, in double precision.
#include <gtest/gtest.h>

#include <cstdlib>
#include <dnnl.hpp>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

struct Case {
  std::int64_t batch, height, width, in, out;
  int kernel, stride, pad_begin, pad_end;
  bool residual = false;
  bool bias = true;
};

/// Value of the result and the sum of the absolute values of its terms, which bounds rounding.
struct Reference {
  double value = 0;
  double magnitude = 0;
};

struct Inputs {
  Tensor x, weight, bias, residual;
};

Inputs make_inputs(const Case& c, DType type, unsigned seed) {
  const std::int64_t height = (c.height + c.pad_begin + c.pad_end - c.kernel) / c.stride + 1;
  const std::int64_t width = (c.width + c.pad_begin + c.pad_end - c.kernel) / c.stride + 1;
  Inputs in;
  in.x = testing::random_tensor({c.batch, c.height, c.width, c.in}, seed).to(type);
  in.weight = testing::random_tensor({c.out, c.in, c.kernel, c.kernel}, seed + 1, 0.2F).to(type);
  if (c.bias) in.bias = testing::random_tensor({c.out}, seed + 2);
  if (c.residual) in.residual = testing::random_tensor({c.batch, height, width, c.out}, seed + 3).to(type);
  return in;
}

Reference reference_at(const Case& c, const Inputs& in, std::int64_t b, std::int64_t y, std::int64_t x, std::int64_t o,
                       std::int64_t flat) {
  Reference sum;
  const auto add = [&sum](double term) {
    sum.value += term;
    sum.magnitude += std::abs(term);
  };
  if (c.bias) add(in.bias.data<float>()[o]);
  if (c.residual) add(in.residual.data<float>()[flat]);
  for (int ky = 0; ky < c.kernel; ++ky)
    for (int kx = 0; kx < c.kernel; ++kx) {
      const std::int64_t sy = y * c.stride + ky - c.pad_begin;
      const std::int64_t sx = x * c.stride + kx - c.pad_begin;
      if (sy < 0 || sy >= c.height || sx < 0 || sx >= c.width) continue;
      for (std::int64_t i = 0; i < c.in; ++i)
        add(static_cast<double>(in.x.data<float>()[((b * c.height + sy) * c.width + sx) * c.in + i]) *
            in.weight.data<float>()[((o * c.in + i) * c.kernel + ky) * c.kernel + kx]);
    }
  return sum;
}

/// Largest error of `result` in units of what rounding allows: f32 sums, and one rounding to the result's type.
double worst_error(const Case& c, Inputs in, const Tensor& result) {
  in.x = in.x.to(DType::f32);
  in.weight = in.weight.to(DType::f32);
  if (c.residual) in.residual = in.residual.to(DType::f32);
  const double rounding = result.dtype() == DType::bf16 ? std::ldexp(1.0, -8) : 0.0;
  const Tensor got = result.to(DType::f32);
  double worst = 0;
  std::int64_t flat = 0;
  for (std::int64_t b = 0; b < result.dim(0); ++b)
    for (std::int64_t y = 0; y < result.dim(1); ++y)
      for (std::int64_t x = 0; x < result.dim(2); ++x)
        for (std::int64_t o = 0; o < result.dim(3); ++o, ++flat) {
          const Reference want = reference_at(c, in, b, y, x, o, flat);
          const double allowed = rounding * std::abs(want.value) + 1e-6 * want.magnitude;
          const double error = std::abs(got.data<float>()[flat] - want.value) / allowed;
          if (!(error <= worst)) worst = error;
        }
  return worst;
}

double run(const Case& c, DType compute, DType input, unsigned seed) {
  const auto backend = testing::make_backend(compute, 0);
  Inputs in = make_inputs(c, compute, seed);
  const auto weights = backend->prepare_convolution(in.weight, in.bias, c.stride, c.pad_begin, c.pad_end);
  const Tensor result = backend->convolution(in.x.to(input), *weights, in.residual);
  EXPECT_EQ(result.dtype(), compute);
  // The second call takes the primitive from the cache.
  EXPECT_EQ(testing::max_difference(result, backend->convolution(in.x.to(input), *weights, in.residual)), 0);
  return worst_error(c, in, result);
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {1, 9, 13, 16, 32, 3, 1, 1, 1},       {2, 7, 5, 14, 24, 3, 1, 1, 1},
      {1, 11, 8, 3, 16, 3, 1, 1, 1},        {1, 17, 19, 16, 3, 3, 1, 1, 1},
      {1, 10, 6, 32, 16, 1, 1, 0, 0},       {3, 5, 7, 17, 19, 3, 1, 1, 1},
      {1, 12, 10, 16, 16, 3, 2, 0, 1},      {2, 13, 9, 24, 8, 3, 2, 0, 1},
      {1, 9, 13, 16, 32, 3, 1, 1, 1, true}, {2, 6, 7, 128, 64, 3, 1, 1, 1, true},
      {1, 5, 4, 19, 3, 3, 1, 1, 1, true},   {1, 8, 8, 32, 32, 3, 1, 1, 1, false, false},
      {1, 1, 1, 16, 16, 3, 1, 1, 1},        {2, 3, 4, 7, 5, 1, 1, 0, 0, true},
  };
  return all;
}

std::string describe(const Case& c) {
  return to_string(Shape{c.batch, c.height, c.width, c.in, c.out, c.kernel, c.stride}) +
         (c.residual ? " residual" : "");
}

TEST(Convolution, MatchesTheDefinitionF32) {
  unsigned seed = 100;
  for (const Case& c : cases()) EXPECT_LE(run(c, DType::f32, DType::f32, seed += 10), 1.0) << describe(c);
}

TEST(Convolution, MatchesTheDefinitionBf16) {
  unsigned seed = 1100;
  for (const Case& c : cases()) EXPECT_LE(run(c, DType::bf16, DType::bf16, seed += 10), 1.0) << describe(c);
}

TEST(Convolution, ConvertsF32InputToTheComputeType) {
  unsigned seed = 2100;
  for (const Case& c : cases()) EXPECT_LE(run(c, DType::bf16, DType::f32, seed += 10), 1.0) << describe(c);
}

TEST(Convolution, OfAnEnlargedMapIsTheSameInOneStep) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const auto& [batch, height, width, in, out] :
         {std::array{1, 8, 6, 16, 32}, {2, 5, 7, 32, 16}, {1, 1, 1, 8, 8}, {1, 3, 2, 7, 5}}) {
      const auto backend = testing::make_backend(type, 0);
      const Case c{batch, height, width, in, out, 3, 1, 1, 1};
      const Inputs inputs = make_inputs(c, type, 40 + static_cast<unsigned>(height));
      const auto weights = backend->prepare_convolution(inputs.weight, inputs.bias, 1, 1, 1);
      const Tensor want = backend->convolution(backend->upsample_nearest_2x(inputs.x), *weights, {});
      // The weights of one pixel may be added before they are rounded.
      EXPECT_LT(testing::max_difference(backend->upsampled_convolution(inputs.x, *weights), want),
                type == DType::bf16 ? 0.1 : 1e-4)
          << describe(c);
    }
}

TEST(Convolution, OneSetOfWeightsServesManySizes) {
  const auto backend = testing::make_backend(DType::f32, 0);
  Case c{1, 8, 8, 16, 16, 3, 1, 1, 1};
  Inputs in = make_inputs(c, DType::f32, 7);
  const auto weights = backend->prepare_convolution(in.weight, in.bias, 1, 1, 1);
  for (const auto& [batch, height, width] : {std::array{1, 8, 8}, {2, 5, 9}, {1, 31, 3}, {2, 5, 9}}) {
    c.batch = batch;
    c.height = height;
    c.width = width;
    for (const bool residual : {false, true}) {
      c.residual = residual;
      Inputs sized = make_inputs(c, DType::f32, static_cast<unsigned>(height));
      sized.weight = in.weight;
      sized.bias = in.bias;
      EXPECT_LE(worst_error(c, sized, backend->convolution(sized.x, *weights, sized.residual)), 1.0) << describe(c);
    }
  }
}

// Machines without AVX-512 have no bf16 convolution in oneDNN: it is computed in f32 between bf16 maps. A process of
// its own, because oneDNN takes the limit before its first primitive only.
TEST(ConvolutionDeathTest, Bf16WorksWithoutAvx512) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto without_avx512 = [] {
    if (dnnl::set_max_cpu_isa(dnnl::cpu_isa::avx2) != dnnl::status::success) std::exit(2);
    for (const Case& c : cases())
      if (run(c, DType::bf16, DType::bf16, 42) > 1.0) std::exit(1);
    std::exit(0);
  };
  EXPECT_EXIT(without_avx512(), ::testing::ExitedWithCode(0), "");
}

TEST(Convolution, RefusesWhatDoesNotFit) {
  const auto backend = testing::make_backend(DType::f32, 0);
  const auto random = [](Shape shape) { return testing::random_tensor(std::move(shape), 1); };
  const auto weights = backend->prepare_convolution(random({8, 4, 3, 3}), random({8}), 1, 0, 0);
  EXPECT_THROW(backend->convolution(random({1, 5, 5, 3}), *weights, {}), Error);
  EXPECT_THROW(backend->convolution(random({5, 5, 4}), *weights, {}), Error);
  EXPECT_THROW(backend->convolution(random({1, 2, 5, 4}), *weights, {}), Error);
  EXPECT_THROW(backend->convolution(random({1, 5, 5, 4}), *weights, random({1, 5, 5, 8})), Error);
  EXPECT_THROW(backend->prepare_convolution(random({8, 4, 3, 1}), random({8}), 1, 0, 0), Error);
  EXPECT_THROW(backend->prepare_convolution(random({8, 4, 3, 3}), random({7}), 1, 0, 0), Error);
  EXPECT_THROW(backend->prepare_convolution(random({8, 4, 3, 3}), random({8}), 0, 0, 0), Error);
}

}  // namespace
}  // namespace sparvar
