// Layers of 8-bit floats against double precision, on a Hopper GPU (SPARVAR_TEST_DEVICE=cuda).
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "core/e4m3.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_tensor;

/// The nearest e4m3 number, ties to even; beyond 448 it is 448.
double e4m3(float value) {
  if (std::isnan(value)) return value;
  const double magnitude = std::abs(static_cast<double>(value));
  if (magnitude == 0) return 0;
  const double step = std::ldexp(1.0, std::max(std::ilogb(magnitude), -6) - 3);
  return std::copysign(std::min(std::nearbyint(magnitude / step) * step, 448.0), value);
}

/// What the rows of x are once they are e4m3 with a factor a row.
std::vector<double> through_e4m3(const Tensor& tensor) {
  const Tensor x = tensor.to(DType::f32);
  const std::int64_t width = x.dim(-1);
  std::vector<double> out(static_cast<std::size_t>(x.size()));
  for (std::int64_t r = 0; r < x.size() / width; ++r) {
    const float* row = x.data<float>() + r * width;
    float largest = 0;
    for (std::int64_t i = 0; i < width; ++i) largest = std::fmax(largest, std::abs(row[i]));  // NaN loses
    const float scale = std::max(largest / 448.0F, 0x1p-120F);
    const float inverse = 1.0F / scale;
    for (std::int64_t i = 0; i < width; ++i)
      out[static_cast<std::size_t>(r * width + i)] = e4m3(row[i] * inverse) * static_cast<double>(scale);
  }
  return out;
}

double gelu(double y) { return 0.5 * y * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y))); }

/// x W^T + b of such rows; a bias is bf16, as the result.
struct Product {
  std::int64_t rows, in, out;
  std::vector<double> y, size;  // size: the sum of the magnitudes of the terms

  Product(const Tensor& x, const Tensor& w, const Tensor& bias)
      : rows(x.size() / x.dim(-1)), in(w.dim(1)), out(w.dim(0)), y(rows * out), size(rows * out) {
    const std::vector<double> xs = through_e4m3(x), ws = through_e4m3(w);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t o = 0; o < out; ++o) {
        double sum = bias.defined() ? to_float(to_bfloat16(bias.data<float>()[o])) : 0, magnitude = std::abs(sum);
        for (std::int64_t i = 0; i < in; ++i) {
          const double term = xs[r * in + i] * ws[o * in + i];
          sum += term;
          magnitude += std::abs(term);
        }
        y[r * out + o] = sum;
        size[r * out + o] = magnitude;
      }
  }
  /// The largest difference from `found`, as a multiple of what bf16 results and sums of 13 bits may be off.
  double worst(
      const Tensor& result, const std::function<double(double)>& of = [](double v) { return v; }) const {
    const Tensor found = result.to(DType::f32);
    double worst = 0;
    for (std::int64_t i = 0; i < rows * out; ++i) {
      const double allowed = 0x1p-8 * std::abs(of(y[i])) + 0x1p-11 * size[i] + 1e-30;
      const double off = std::abs(found.data<float>()[i] - of(y[i])) / allowed;
      if (!(off <= worst)) worst = off;
    }
    return worst;
  }
  double relative(const Tensor& result) const {
    const Tensor found = result.to(DType::f32);
    double off = 0, all = 0;
    for (std::int64_t i = 0; i < rows * out; ++i) {
      off += std::pow(found.data<float>()[i] - y[i], 2);
      all += y[i] * y[i];
    }
    return std::sqrt(off / all);
  }
};

/// Rows of very different sizes, as a wrong factor would be seen in.
Tensor uneven_rows(const Shape& shape, unsigned seed) {
  Tensor x = random_tensor(shape, seed);
  const std::int64_t width = x.dim(-1);
  for (std::int64_t i = 0; i < x.size(); ++i)
    x.data<float>()[i] *= std::pow(10.0F, static_cast<float>(i / width * 7 % 5 - 2));
  return x;
}

TEST(Fp8OnTheCpu, NarrowLayersArePlain) {
  const auto backend = make_cpu_backend({.compute = DType::bf16, .threads = 2});
  const Tensor x = random_tensor({5, 32}, 1).to(DType::bf16), w = random_tensor({48, 32}, 2),
               bias = random_tensor({48}, 3);
  const LinearPtr plain = backend->prepare_linear(w, bias),
                  narrow = backend->prepare_linear(w, bias, LinearKind::narrow);
  EXPECT_EQ(narrow->input, DType::bf16);
  EXPECT_EQ(testing::max_difference(backend->linear(x, *plain, Activation::none, DType::f32),
                                    backend->linear(x, *narrow, Activation::none, DType::f32)),
            0);
}

TEST(Fp8OnTheCpu, WeightsKeptAsFp8AreWidened) {
  for (const DType compute : {DType::f32, DType::bf16}) {
    const auto backend = make_cpu_backend({.compute = compute, .threads = 2});
    const Tensor x = random_tensor({5, 32}, 1).to(compute), kept = e4m3_rows(random_tensor({48, 32}, 2));
    const LinearPtr a = backend->prepare_linear(kept, {}, LinearKind::narrow),
                    b = backend->prepare_linear(kept.to(DType::f32), {});
    EXPECT_EQ(testing::max_difference(backend->linear(x, *a, Activation::none, DType::f32),
                                      backend->linear(x, *b, Activation::none, DType::f32)),
              0);
  }
}

class Fp8 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!testing::on_gpu()) GTEST_SKIP() << "the CPU has no fp8 layers";
    std::string why;
    backend =
        make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = false, .hopper = true}, why);
    if (!backend && why.find("8-bit floats need") != std::string::npos) GTEST_SKIP() << why;
    ASSERT_NE(backend, nullptr) << why;
  }
  LinearPtr layer(const Tensor& w, const Tensor& bias) {
    LinearPtr made = backend->prepare_linear(w, bias, LinearKind::narrow);
    backend->reserve([] {});  // weights have arrived
    return made;
  }
  Tensor multiply(const Tensor& x, const Linear& weights, Activation activation, DType out) {
    return backend->download(backend->linear(backend->upload(x), weights, activation, out));
  }
  std::unique_ptr<Backend> backend;
  unsigned seed = std::random_device{}();
};

TEST_F(Fp8, ProductsMatchDoublePrecision) {
  for (const auto& [rows, in, out] :
       {std::array{1L, 128L, 16L}, std::array{2L, 1040L, 144L}, std::array{8L, 128L, 20000L},
        std::array{31L, 208L, 272L}, std::array{33L, 592L, 128L}, std::array{64L, 4096L, 64L}, std::array{7L, 64L, 32L},
        std::array{65L, 16L, 16L}, std::array{72L, 80L, 208L}, std::array{128L, 272L, 144L},
        std::array{129L, 528L, 144L}, std::array{287L, 144L, 400L}, std::array{513L, 3584L, 64L},
        std::array{71L, 528L, 2000L}, std::array{90L, 528L, 3312L}, std::array{127L, 272L, 7152L},
        std::array{144L, 128L, 14416L}})
    for (const bool biased : {true, false}) {
      const Tensor x = uneven_rows({rows, in}, seed).to(biased ? DType::f32 : DType::bf16),
                   w = uneven_rows({out, in}, seed + 1);
      const Tensor bias = biased ? random_tensor({out}, seed + 2) : Tensor();
      const LinearPtr weights = layer(w, bias);
      ASSERT_EQ(weights->input, DType::e4m3);
      const Product want(x, w, bias);
      for (const DType type : {DType::bf16, DType::f32}) {
        EXPECT_LT(want.worst(multiply(x, *weights, Activation::none, type)), 1.5) << rows << "x" << in << "x" << out;
        EXPECT_LT(want.worst(multiply(x, *weights, Activation::gelu_tanh, type), gelu), 4)
            << rows << " " << in << " " << out;
      }
    }
}

/// The first rows and channels of y.
Tensor corner(const Tensor& y, std::int64_t rows, std::int64_t channels) {
  Tensor out = Tensor::empty(y.dtype(), {rows, channels});
  for (std::int64_t r = 0; r < rows; ++r)
    std::copy_n(y.data<std::byte>() + r * y.dim(1) * static_cast<std::int64_t>(size_of(y.dtype())),
                channels * static_cast<std::int64_t>(size_of(y.dtype())),
                out.data<std::byte>() + r * channels * static_cast<std::int64_t>(size_of(y.dtype())));
  return out;
}

// That of CUDA 13.0: 72 rows, this depth. Few channels are left to it.
TEST_F(Fp8, ProductsThatTheLibraryDoesNotScale) {
  for (const auto& [channels, biased] :
       std::array{std::pair{3584L, true}, std::pair{256L, true}, std::pair{256L, false}}) {
    const Tensor x = uneven_rows({72, 14336}, seed), w = uneven_rows({channels, 14336}, seed + 1),
                 bias = random_tensor({channels}, seed + 2, 100);
    const LinearPtr weights = layer(w, biased ? bias : Tensor());
    const Product want(x.rows(0, 5), w.rows(0, 40), biased ? bias : Tensor());
    const Tensor plain = multiply(x, *weights, Activation::none, DType::bf16);
    EXPECT_LT(want.worst(corner(plain, 5, 40)), 2.5);  // rounded twice
    EXPECT_LT(want.worst(corner(multiply(x, *weights, Activation::gelu_tanh, DType::bf16), 5, 40), gelu), 5);
  }
}

TEST_F(Fp8, LayersOfOtherSizesAndKindsAreNot) {
  EXPECT_EQ(layer(random_tensor({16, 24}, seed), {})->input, DType::bf16);
  EXPECT_EQ(layer(random_tensor({24, 16}, seed), {})->input, DType::bf16);
  EXPECT_EQ(backend->prepare_linear(random_tensor({16, 16}, seed), {})->input, DType::bf16);
  EXPECT_EQ(backend->prepare_linear(random_tensor({16, 16}, seed), {}, LinearKind::precise)->input, DType::f32);
}

TEST_F(Fp8, RowsOfZerosHugeAndTinyNumbersAndNans) {
  const std::int64_t in = 256, out = 64;
  const float infinity = std::numeric_limits<float>::infinity();
  for (const std::int64_t rows : {8L, 80L}) {  // both kinds of product
    Tensor x = random_tensor({rows, in}, seed), w = random_tensor({out, in}, seed + 1, 0.1F),
           bias = random_tensor({out}, seed + 2);
    const auto row = [&](std::int64_t r) { return x.data<float>() + r * in; };
    std::fill_n(row(0), in, 0.0F);
    for (std::int64_t i = 0; i < in; ++i) row(1)[i] *= 1e30F, row(2)[i] *= 1e-40F, row(3)[i] *= 1e-3F;
    row(3)[5] = 1e4F;  // beside it the others are nothing
    row(4)[17] = std::nanf("");
    row(5)[200] = -infinity;
    row(6)[0] = 3e38F;
    std::fill_n(w.data<float>() + 9 * in, in, 0.0F);  // a channel
    const Product want(x, w, bias);
    const Tensor found = multiply(x, *layer(w, bias), Activation::none, DType::bf16).to(DType::f32);
    const auto at = [&](std::int64_t r, std::int64_t o) { return found.data<float>()[r * out + o]; };
    for (std::int64_t o = 0; o < out; ++o) {
      const float rounded = to_float(to_bfloat16(bias.data<float>()[o]));
      EXPECT_EQ(at(0, o), rounded);
      EXPECT_EQ(at(2, o), rounded);
      EXPECT_TRUE(std::isnan(at(4, o)));
      EXPECT_TRUE(std::isnan(at(5, o)));
      for (const std::int64_t r : {1L, 3L, 7L, rows - 1}) {
        const double allowed = 0x1p-7 * std::abs(want.y[r * out + o]) + 0x1p-10 * want.size[r * out + o];
        EXPECT_NEAR(at(r, o), want.y[r * out + o], allowed) << r << " " << o;
      }
      if (o != 9) {
        EXPECT_NEAR(at(6, o) / want.y[6 * out + o], 1, 2e-2) << o;
      } else {
        EXPECT_EQ(at(7, o), rounded);
      }
    }
  }
}

TEST_F(Fp8, NormsMakeTheRowsThatAProductReads) {
  for (const std::int64_t width : {16L, 64L, 256L, 1040L, 3584L, 8192L})
    for (const std::int64_t tokens : {3L, 150L}) {
      const Tensor x = random_tensor({2, tokens, width}, seed, 3), y = random_tensor({2, tokens, width}, seed + 1),
                   scale = random_tensor({2, width}, seed + 2), shift = random_tensor({2, width}, seed + 3),
                   gate = random_tensor({2, width}, seed + 4), w = uneven_rows({48, width}, seed + 5);
      const LinearPtr weights = layer(w, {});
      Tensor normed = Tensor::empty(DType::f32, x.shape()), summed = normed.to(DType::f32);
      for (const bool added : {false, true})
        for (std::int64_t r = 0; r < 2 * tokens; ++r) {
          std::vector<double> row(width);
          double mean = 0, variance = 0;
          for (std::int64_t i = 0; i < width; ++i) {
            row[i] = x.data<float>()[r * width + i];
            const float rounded = to_float(to_bfloat16(y.data<float>()[r * width + i]));
            if (added) row[i] += static_cast<double>(gate.data<float>()[r / tokens * width + i]) * rounded;
            mean += row[i] / static_cast<double>(width);
          }
          for (const double value : row) variance += (value - mean) * (value - mean) / static_cast<double>(width);
          for (std::int64_t i = 0; i < width; ++i)
            (added ? summed : normed).data<float>()[r * width + i] = static_cast<float>(
                (row[i] - mean) / std::sqrt(variance + 1e-6) * (1 + scale.data<float>()[r / tokens * width + i]) +
                shift.data<float>()[r / tokens * width + i]);
        }
      const NormArgs args{.scale = backend->upload(scale),
                          .shift = backend->upload(shift),
                          .one_plus = 1.0F,
                          .eps = 1e-6F,
                          .out = weights->input};
      Tensor residual = backend->upload(x);
      const Tensor plain = backend->layer_norm(residual, args);
      EXPECT_EQ(plain.dtype(), DType::e4m3);
      const auto product = [&](const Tensor& rows) {
        return backend->download(backend->linear(rows, *weights, Activation::none, DType::bf16));
      };
      EXPECT_LT(Product(normed, w, {}).relative(product(plain)), 4e-3) << width << " " << tokens;
      for (const DType type : {DType::bf16, DType::f32}) {
        Tensor start = backend->upload(x);
        const Tensor given = type == DType::bf16 ? y.to(type) : y.to(DType::bf16).to(type);
        const Tensor after = backend->add_gated_norm(start, backend->upload(given), backend->upload(gate), args);
        EXPECT_LT(Product(summed, w, {}).relative(product(after)), 4e-3) << width << " " << tokens;
      }
    }
}

TEST_F(Fp8, GeluIsMadeBetweenTwoLayers) {
  for (const std::int64_t rows : {2L, 64L, 300L}) {
    const Tensor x = random_tensor({rows, 256}, seed), w1 = random_tensor({1024, 256}, seed + 1, 0.1F),
                 b1 = random_tensor({1024}, seed + 2), w2 = uneven_rows({64, 1024}, seed + 3);
    const LinearPtr first = layer(w1, b1), second = layer(w2, {});
    const Tensor hidden = backend->linear(backend->upload(x), *first, Activation::gelu_tanh, second->input);
    EXPECT_EQ(hidden.dtype(), DType::e4m3);
    // What the first layer gives is rounded to bf16 on its way: its own rounding is taken from the device.
    const Tensor between = multiply(x, *first, Activation::none, DType::bf16).to(DType::f32);
    Tensor active = between.to(DType::f32);
    for (std::int64_t i = 0; i < active.size(); ++i)
      active.data<float>()[i] = static_cast<float>(gelu(between.data<float>()[i]));
    const Tensor found = backend->download(backend->linear(hidden, *second, Activation::none, DType::bf16));
    EXPECT_LT(Product(active, w2, {}).relative(found), 4e-3) << rows;
  }
}

TEST_F(Fp8, WeightsAreLoadedInPiecesAndFromTheDevice) {
  const Tensor w = uneven_rows({4112, 2048}, seed), x = random_tensor({2, 2048}, seed + 1);  // 33 MB: three pieces
  EXPECT_LT(Product(x, w, {}).worst(multiply(x, *layer(w, {}), Activation::none, DType::bf16)), 1.5);
  const Tensor there = backend->random(DType::bf16, {272, 144}, 5, 1.0F);
  const Tensor here = backend->download(there);
  const Tensor y = random_tensor({70, 144}, seed + 2);
  const Tensor from_there = multiply(y, *layer(there, {}), Activation::none, DType::bf16);
  EXPECT_LT(Product(y, here, {}).worst(from_there), 1.5);
  EXPECT_EQ(testing::max_difference(from_there, multiply(y, *layer(here, {}), Activation::none, DType::bf16)), 0);
}

// A model folder of fp8 weights: the host's bits are the device's, so the layers are the same.
TEST_F(Fp8, WeightsKeptAsFp8AreThoseMadeWhileLoading) {
  for (const auto& [out, in] : {std::pair{4112L, 2048L}, {48L, 32L}, {16L, 14336L}}) {
    Tensor w = uneven_rows({out, in}, seed).to(DType::bf16);
    std::fill_n(w.data<BFloat16>(), in, BFloat16{});  // a row of zeros
    w.data<BFloat16>()[in + 3] = to_bfloat16(1e30F);
    const Tensor x = random_tensor({70, in}, seed + 1);
    const Tensor loaded = multiply(x, *layer(w, {}), Activation::none, DType::bf16);
    EXPECT_EQ(testing::max_difference(multiply(x, *layer(e4m3_rows(w), {}), Activation::none, DType::bf16), loaded), 0);
  }
}

// Where a device multiplies bf16 they are widened.
TEST_F(Fp8, WeightsKeptAsFp8AreWidenedWhereAskedFor) {
  std::string why;
  const auto plain =
      make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = false, .planning = false, .hopper = true}, why);
  const Tensor kept = e4m3_rows(random_tensor({48, 32}, seed)), x = random_tensor({5, 32}, seed + 1);
  const auto product = [&](const Tensor& w) {
    const LinearPtr made = plain->prepare_linear(w, {}, LinearKind::narrow);
    EXPECT_EQ(made->input, DType::bf16);
    return plain->download(plain->linear(plain->upload(x), *made, Activation::none, DType::f32));
  };
  EXPECT_EQ(testing::max_difference(product(kept), product(kept.to(DType::f32))), 0);
}

TEST_F(Fp8, WeightsTakeHalfTheMemory) {
  std::string why;
  const auto bytes = [&](bool fp8) {
    const auto planner =
        make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = fp8, .planning = true, .hopper = true}, why);
    const LinearPtr kept = planner->prepare_linear(Tensor::empty(DType::bf16, {8192, 4096}), {}, LinearKind::narrow);
    planner->reserve([] {});
    return planner->memory_use().weights;
  };
  const std::int64_t workspace = bytes(false) - 2L * 8192 * 4096;
  EXPECT_LE(bytes(true) - workspace, 8192L * 4096 + 4 * 8192 + 1024);
}

}  // namespace
}  // namespace sparvar
