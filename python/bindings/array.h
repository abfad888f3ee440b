// Arrays of Python (numpy, torch, anything with DLPack) as the engine takes them, checked, never copied.
#pragma once

#include <fmt/format.h>
#include <nanobind/ndarray.h>

#include <array>
#include <string>

#include "bindings.h"
#include "core/tensor.h"
#include "sparvar/attention.h"
#include "sparvar/error.h"

namespace sparvar::python {

/// q, k, v or out: (batch, heads, tokens, channels).
struct Array4 {
  std::string name;
  void* data = nullptr;
  DType dtype = DType::f32;
  std::array<std::int64_t, 4> shape{}, strides{};  // strides in elements
  bool on_gpu = false;
  int device = 0;

  AttentionStrides attention_strides() const { return {strides[0], strides[1], strides[2]}; }
  std::string text() const;                // "float32 (1, 4, 64, 32)"
  bool packed() const;                     // nothing lies between its rows
  Tensor tensor() const;                   // packed only
  Tensor cache(std::int64_t heads) const;  // [B, H, capacity, D] whose first rows are the array's
};

/// Throws Error(usage) where it has not 4 dimensions, is neither float32 nor bfloat16, or its channels are not next to
/// each other. `words`: 16-bit words are bfloat16 (numpy has no name for it).
template <typename Any>
Array4 array4(const char* name, const Any& array, bool words);

/// Throws Error(usage) where an array on a GPU does not begin at a multiple of 16 bytes.
void require_gpu_alignment(const char* name, std::uintptr_t address);

/// Throws Error(usage) where q (B, H, queries, D), k and v (B, H, keys, D) and out (as q) do not fit each other.
void require_fit(const Array4& q, const Array4& k, const Array4& v, const Array4& out, std::int64_t queries,
                 std::int64_t keys);

struct RawArray {
  const char* name;
  void* data;
  std::size_t dimensions;
  const std::int64_t* shape;
  const std::int64_t* strides;
  nb::dlpack::dtype dtype;
  int device_type, device;
  bool words;
};
Array4 checked(const RawArray& raw);

template <typename Any>
Array4 array4(const char* name, const Any& array, bool words) {
  return checked({.name = name,
                  .data = const_cast<void*>(static_cast<const void*>(array.data())),
                  .dimensions = array.ndim(),
                  .shape = array.shape_ptr(),
                  .strides = array.stride_ptr(),
                  .dtype = array.dtype(),
                  .device_type = array.device_type(),
                  .device = array.device_id(),
                  .words = words});
}

}  // namespace sparvar::python
