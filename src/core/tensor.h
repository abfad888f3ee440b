// Contiguous tensors: a shape, a type, and shared storage (owned, pooled, memory-mapped, or on a device).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sparvar {

/// e4m3: 8-bit floats [..., C] with an f32 factor for every row of C behind them (core/e4m3.h); such a tensor is read
/// whole (no rows() of it), on a device by the backend that made it.
enum class DType : std::uint8_t { f32, bf16, f16, f64, i8, u8, i16, i32, i64, boolean, e4m3 };

std::size_t size_of(DType dtype);
const char* name_of(DType dtype);

using Shape = std::vector<std::int64_t>;
std::string to_string(const Shape& shape);  // "[2, 64, 64]"

/// Bit pattern of a bfloat16 number; conversions round to nearest even.
struct BFloat16 {
  std::uint16_t bits = 0;
};
float to_float(BFloat16 value);
BFloat16 to_bfloat16(float value);
float half_to_float(std::uint16_t bits);

/// Where the elements are. Those of a device tensor are read and written by its backend only.
enum class Place : std::uint8_t { host, device };

class Tensor {
 public:
  Tensor() = default;
  /// A view of memory kept alive by `owner` (may be null: the caller keeps it alive).
  Tensor(void* data, DType dtype, Shape shape, std::shared_ptr<const void> owner, Place place = Place::host);
  /// Fresh, 64-byte aligned, uninitialised storage. Throws Error(system) where memory is out.
  static Tensor empty(DType dtype, Shape shape);
  static Tensor zeros(DType dtype, Shape shape);
  static Tensor from(const std::vector<float>& values, Shape shape);

  bool defined() const { return data_ != nullptr || (!shape_.empty() && size() == 0); }
  DType dtype() const { return dtype_; }
  Place place() const { return place_; }
  const Shape& shape() const { return shape_; }
  int rank() const { return static_cast<int>(shape_.size()); }
  std::int64_t dim(int axis) const;  // negative counts from the end
  std::int64_t size() const;         // elements
  std::size_t bytes() const { return static_cast<std::size_t>(size()) * size_of(dtype_); }

  void* raw() { return data_; }
  const void* raw() const { return data_; }
  template <typename T>
  T* data() {
    return static_cast<T*>(data_);
  }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

  /// Same storage, other shape with the same number of elements.
  Tensor reshaped(Shape shape) const;
  /// Rows [begin, end) of the first axis, sharing storage.
  Tensor rows(std::int64_t begin, std::int64_t end) const;
  /// A converted copy of a host tensor; all types can be read (e4m3: times its factors), f32 and bf16 written.
  Tensor to(DType dtype) const;

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::f32;
  Place place_ = Place::host;
  Shape shape_;
  std::shared_ptr<const void> owner_;
};

}  // namespace sparvar
