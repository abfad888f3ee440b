// 8-bit floats against the definition: every code, the nearest of all codes, rows with their scales.
#include "core/e4m3.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

/// OCP "8-bit floating point" (2023), table 1: S.1111.111 is the NaN, the bias is 7.
double value_of(int code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return (code & 128) != 0 ? -magnitude : magnitude;
}

/// By looking at all of them: the nearest magnitude, of two that are as near the even code.
int nearest(float value) {
  int best = 0;
  for (int code = 1; code < 127; ++code) {
    const double off = std::abs(std::abs(static_cast<double>(value)) - value_of(code));
    const double held = std::abs(std::abs(static_cast<double>(value)) - value_of(best));
    if (off < held || (off == held && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(value) ? 128 : 0);
}

TEST(E4m3, EveryCodeIsTheNumberOfTheDefinition) {
  for (int code = 0; code < 256; ++code) {
    const float found = e4m3_to_float(static_cast<std::uint8_t>(code));
    if ((code & 127) == 127) {
      EXPECT_TRUE(std::isnan(found)) << code;
      continue;
    }
    EXPECT_EQ(found, value_of(code)) << code;
    EXPECT_EQ(std::signbit(found), code >= 128) << code;
    EXPECT_EQ(to_e4m3(found), code) << "there and back";
  }
}

TEST(E4m3, RoundsToTheNearestTiesToEven) {
  std::vector<float> values = {0.0F, -0.0F, 1e-30F, -1e-30F, 1e-42F, 448, 449, 463.9F, 464, 480, 1e9F, -1e9F, INFINITY};
  for (int code = 0; code < 126; ++code) {  // halfway to the next number, and just beside it
    const auto half = static_cast<float>((value_of(code) + value_of(code + 1)) / 2);
    for (const float value : {half, std::nextafter(half, 0.0F), std::nextafter(half, 1e9F)})
      values.insert(values.end(), {value, -value});
  }
  std::mt19937 generator(3);
  std::uniform_real_distribution<float> exponent(-12, 10);
  for (int i = 0; i < 20000; ++i) values.push_back((i % 2 != 0 ? 1.0F : -1.0F) * std::exp2(exponent(generator)));
  for (const float value : values) ASSERT_EQ(to_e4m3(value), nearest(value)) << value;
  EXPECT_EQ(to_e4m3(NAN), 0x7f);
}

TEST(E4m3, RowsHaveTheirOwnScaleAndComeBackWithinAStep) {
  for (const Shape& shape : {Shape{5, 48}, {3, 17}, {300, 1}, {2, 3, 8}}) {
    const Tensor x = testing::random_tensor(shape, 7, 3.0F);
    const Tensor kept = e4m3_rows(x), back = kept.to(DType::f32);
    ASSERT_EQ(kept.dtype(), DType::e4m3);
    ASSERT_EQ(kept.shape(), shape);
    const std::int64_t width = shape.back();
    const Tensor scales = e4m3_row_scales(x);
    ASSERT_EQ(scales.shape(), (Shape{x.size() / width}));
    for (std::int64_t row = 0; row < x.size() / width; ++row) {
      float largest = 0;
      for (std::int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(x.data<float>()[row * width + i]));
      ASSERT_EQ(scales_of(kept)[row], largest / 448);
      ASSERT_EQ(scales.data<float>()[row], largest / 448);
      for (std::int64_t i = row * width; i < (row + 1) * width; ++i) {
        const float factor = 1 / scales_of(kept)[row];
        ASSERT_EQ(kept.data<std::uint8_t>()[i], nearest(x.data<float>()[i] * factor));
        const float allowed = std::max(std::abs(x.data<float>()[i]) / 15.9F, scales_of(kept)[row] * 0x1p-9F);
        ASSERT_NEAR(back.data<float>()[i], x.data<float>()[i], allowed) << "half of a step of 3 bits";
      }
    }
  }
}

TEST(E4m3, ZerosStayZeroAndCopiesHaveTheirScales) {
  const Tensor zeros = e4m3_rows(Tensor::zeros(DType::bf16, {2, 16}));
  EXPECT_EQ(scales_of(zeros)[1], 0x1p-120F) << "its inverse is finite";
  EXPECT_EQ(zeros.to(DType::f32).data<float>()[31], 0);
  EXPECT_EQ(e4m3_rows(Tensor::zeros(DType::f32, {0, 16})).size(), 0);
  EXPECT_EQ(e4m3_row_scales(Tensor::zeros(DType::f32, {0, 16})).size(), 0);
  const Tensor x = e4m3_rows(testing::random_tensor({3, 5}, 1)), copy = x.to(DType::e4m3);
  EXPECT_NE(copy.raw(), x.raw());
  EXPECT_EQ(testing::max_difference(copy, x), 0);
  EXPECT_EQ(storage_bytes(DType::e4m3, {3, 5}), 16U + 12U);
  EXPECT_EQ(storage_bytes(DType::bf16, {3, 5}), 30U);
  EXPECT_THROW((void)testing::random_tensor({3, 5}, 1).to(DType::e4m3), Error) << "rows are made by e4m3_rows";
}

TEST(E4m3, BfloatRowsGiveTheBitsOfTheirFloats) {
  const Tensor narrow = testing::random_tensor({9, 64}, 5).to(DType::bf16);
  const Tensor a = e4m3_rows(narrow), b = e4m3_rows(narrow.to(DType::f32));
  EXPECT_EQ(std::memcmp(a.raw(), b.raw(), storage_bytes(DType::e4m3, {9, 64})), 0);
}

}  // namespace
}  // namespace sparvar
