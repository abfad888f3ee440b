#include "core/e4m3.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/parallel.h"

namespace sparvar {
namespace {

constexpr std::uint32_t kLargest = 0x7e, kNan = 0x7f;
constexpr float kSmallestNormal = 0x1p-6F;
constexpr std::size_t kScaleAlignment = 16;

std::size_t before_scales(std::size_t numbers) {
  return (numbers + kScaleAlignment - 1) / kScaleAlignment * kScaleAlignment;
}

float scale_of(const float* row, std::int64_t width) {
  float largest = 0;
  for (std::int64_t i = 0; i < width; ++i) largest = std::fmax(largest, std::abs(row[i]));
  return std::max(largest / 448.0F, 0x1p-120F);
}

/// body(row) for each row of x, which has numbers.
template <typename Body>
void for_rows(const Tensor& x, Body&& body) {
  const std::int64_t width = x.dim(-1);
  parallel_ranges(x.size() / width, std::max<std::int64_t>(1, (1 << 14) / width),
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t row = begin; row < end; ++row) body(row);
                  });
}

}  // namespace

std::uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80U;
  const float magnitude = std::abs(value);
  if (std::isnan(value)) return kNan;
  if (magnitude < kSmallestNormal)  // steps of 2^-9; 8 of them are the smallest normal number
    return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(std::nearbyint(magnitude * 0x1p9F)));
  const std::uint32_t whole = bits & 0x7fffffffU;
  const std::uint32_t rounded = (whole + 0x7ffffU + (whole >> 20 & 1U)) >> 20;  // exponent and 3 bits of fraction
  return static_cast<std::uint8_t>(sign | std::min(rounded - (120U << 3), kLargest));
}

float e4m3_to_float(std::uint8_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80U) << 24;
  const std::uint32_t whole = bits & 0x7fU;
  if (whole == kNan) return std::bit_cast<float>(sign | 0x7fc00000U);
  if (whole < 8) {
    const float magnitude = static_cast<float>(whole) * 0x1p-9F;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((whole + (120U << 3)) << 20));
}

std::size_t storage_bytes(DType dtype, const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
  if (dtype != DType::e4m3 || shape.empty()) return count * size_of(dtype);
  const std::size_t rows = shape.back() == 0 ? 0 : count / static_cast<std::size_t>(shape.back());
  return before_scales(count) + rows * sizeof(float);
}

float* scales_of(Tensor& x) { return reinterpret_cast<float*>(x.data<std::byte>() + before_scales(x.bytes())); }
const float* scales_of(const Tensor& x) {
  return reinterpret_cast<const float*>(x.data<std::byte>() + before_scales(x.bytes()));
}

Tensor e4m3_rows(const Tensor& x) {
  const Tensor wide = x.dtype() == DType::f32 ? x : x.to(DType::f32);
  Tensor out = Tensor::empty(DType::e4m3, x.shape());
  if (out.size() == 0) return out;
  float* const scales = scales_of(out);
  for_rows(wide, [&](std::int64_t row) {
    const std::int64_t width = wide.dim(-1);
    const float* from = wide.data<float>() + row * width;
    std::uint8_t* to = out.data<std::uint8_t>() + row * width;
    scales[row] = scale_of(from, width);
    const float inverse = 1.0F / scales[row];  // as the GPU: a product, not a quotient
    for (std::int64_t i = 0; i < width; ++i) to[i] = to_e4m3(from[i] * inverse);
  });
  return out;
}

Tensor e4m3_row_scales(const Tensor& x) {
  const Tensor wide = x.dtype() == DType::f32 ? x : x.to(DType::f32);
  if (wide.size() == 0) return Tensor::empty(DType::f32, {0});
  const std::int64_t width = wide.dim(-1);
  Tensor out = Tensor::empty(DType::f32, {wide.size() / width});
  for_rows(wide, [&](std::int64_t row) { out.data<float>()[row] = scale_of(wide.data<float>() + row * width, width); });
  return out;
}

}  // namespace sparvar
