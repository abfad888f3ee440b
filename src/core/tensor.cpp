#include "core/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "core/e4m3.h"
#include "core/memory_pool.h"
#include "sparvar/error.h"

namespace sparvar {

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16:
      return 2;
    default:
      return 1;
  }
}

const char* name_of(DType dtype) {
  constexpr const char* names[] = {"F32", "BF16", "F16", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3"};
  return names[static_cast<int>(dtype)];
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

BFloat16 to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};  // NaN stays NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t fraction = bits & 0x3ffU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000U | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

Tensor::Tensor(void* data, DType dtype, Shape shape, std::shared_ptr<const void> owner, Place place)
    : data_(data), dtype_(dtype), place_(place), shape_(std::move(shape)), owner_(std::move(owner)) {}

Tensor Tensor::empty(DType dtype, Shape shape) {
  Tensor out(nullptr, dtype, std::move(shape), nullptr);
  std::shared_ptr<void> storage = pooled_storage(storage_bytes(dtype, out.shape_));
  out.data_ = storage.get();
  out.owner_ = std::move(storage);
  return out;
}

Tensor Tensor::zeros(DType dtype, Shape shape) {
  Tensor out = empty(dtype, std::move(shape));
  if (out.bytes() > 0) std::memset(out.raw(), 0, out.bytes());
  return out;
}

Tensor Tensor::from(const std::vector<float>& values, Shape shape) {
  Tensor out = empty(DType::f32, std::move(shape));
  if (out.size() != static_cast<std::int64_t>(values.size()))
    throw Error(ErrorKind::usage,
                fmt::format("{} values do not fill a tensor of shape {}", values.size(), to_string(out.shape())));
  std::copy(values.begin(), values.end(), out.data<float>());
  return out;
}

std::int64_t Tensor::dim(int axis) const {
  return shape_.at(static_cast<std::size_t>(axis < 0 ? axis + rank() : axis));
}

std::int64_t Tensor::size() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape_) count *= extent;
  return count;
}

Tensor Tensor::reshaped(Shape shape) const {
  Tensor out(data_, dtype_, std::move(shape), owner_, place_);
  if (out.size() != size())
    throw Error(ErrorKind::usage,
                fmt::format("a tensor of shape {} cannot be seen as {}", to_string(shape_), to_string(out.shape_)));
  return out;
}

Tensor Tensor::rows(std::int64_t begin, std::int64_t end) const {
  Shape shape = shape_;
  const std::int64_t row_bytes = shape[0] == 0 ? 0 : static_cast<std::int64_t>(bytes()) / shape[0];
  shape[0] = end - begin;
  return {static_cast<char*>(data_) + begin * row_bytes, dtype_, std::move(shape), owner_, place_};
}

namespace {

template <typename Read>
void convert(Tensor& out, Read read) {
  const std::int64_t count = out.size();
  if (out.dtype() == DType::f32) {
    for (std::int64_t i = 0; i < count; ++i) out.data<float>()[i] = static_cast<float>(read(i));
  } else {
    for (std::int64_t i = 0; i < count; ++i) out.data<BFloat16>()[i] = to_bfloat16(static_cast<float>(read(i)));
  }
}

}  // namespace

Tensor Tensor::to(DType dtype) const {
  if (place_ != Place::host) throw Error(ErrorKind::usage, "a tensor on a device is converted by its backend only");
  if (dtype == dtype_) {
    Tensor out = empty(dtype, shape_);
    if (bytes() > 0) std::memcpy(out.raw(), raw(), storage_bytes(dtype, shape_));
    return out;
  }
  if (dtype != DType::f32 && dtype != DType::bf16)
    throw Error(ErrorKind::usage, fmt::format("tensors are converted to F32 or BF16, not to {}", name_of(dtype)));
  Tensor out = empty(dtype, shape_);
  const auto as = [&]<typename T>(const T* p) { convert(out, [p](std::int64_t i) { return p[i]; }); };
  switch (dtype_) {
    case DType::f32:
      as(data<float>());
      break;
    case DType::f64:
      as(data<double>());
      break;
    case DType::i8:
      as(data<std::int8_t>());
      break;
    case DType::u8:
    case DType::boolean:
      as(data<std::uint8_t>());
      break;
    case DType::i16:
      as(data<std::int16_t>());
      break;
    case DType::i32:
      as(data<std::int32_t>());
      break;
    case DType::i64:
      as(data<std::int64_t>());
      break;
    case DType::bf16:
      convert(out, [p = data<BFloat16>()](std::int64_t i) { return to_float(p[i]); });
      break;
    case DType::f16:
      convert(out, [p = data<std::uint16_t>()](std::int64_t i) { return half_to_float(p[i]); });
      break;
    case DType::e4m3:
      convert(out, [p = data<std::uint8_t>(), scales = scales_of(*this), width = std::max<std::int64_t>(dim(-1), 1)](
                       std::int64_t i) { return e4m3_to_float(p[i]) * scales[i / width]; });
      break;
  }
  return out;
}

}  // namespace sparvar
