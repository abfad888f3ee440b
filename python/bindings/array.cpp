#include "array.h"

namespace sparvar::python {
namespace {

constexpr int kCpu = nb::device::cpu::value, kCuda = nb::device::cuda::value;
constexpr const char* kOrder = "(batch, heads, tokens, channels)";

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorKind::usage, "attention: " + what); }

std::string name_of(nb::dlpack::dtype type) {
  constexpr const char* codes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  return type.code < std::size(codes) ? fmt::format("{}{}", codes[type.code], type.bits)
                                      : fmt::format("type {} of {} bits", type.code, type.bits);
}

DType dtype_of(const RawArray& raw) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return raw.dtype.code == static_cast<std::uint8_t>(code) && raw.dtype.bits == bits && raw.dtype.lanes == 1;
  };
  if (is(Code::Float, 32)) return DType::f32;
  if (is(Code::Bfloat, 16) || (raw.words && is(Code::UInt, 16))) return DType::bf16;
  refuse(fmt::format("{}: expected float32 or bfloat16, found {}; convert it", raw.name, name_of(raw.dtype)));
}

std::string shape_text(const std::array<std::int64_t, 4>& s) {
  return fmt::format("({}, {}, {}, {})", s[0], s[1], s[2], s[3]);
}

std::string place(const Array4& a) { return a.on_gpu ? fmt::format("cuda:{}", a.device) : "the CPU"; }

void require_shape(const Array4& a, const std::array<std::int64_t, 4>& expected) {
  if (a.shape != expected)
    refuse(fmt::format("{}: expected {}, found {}; the order is {}", a.name, shape_text(expected), shape_text(a.shape),
                       kOrder));
}

}  // namespace

std::string Array4::text() const {
  return fmt::format("{} {}", dtype == DType::f32 ? "float32" : "bfloat16", shape_text(shape));
}

bool Array4::packed() const {
  std::int64_t expected = 1;
  for (int axis = 3; axis >= 0; --axis) {
    if (shape[axis] != 1 && strides[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

Tensor Array4::tensor() const {
  if (!packed())
    refuse(
        fmt::format("{}: rows of {} lie apart (strides {}), which cs4a, probe and GPUs do not take; make it "
                    "contiguous",
                    name, text(), shape_text(strides)));
  return {data, dtype, Shape(shape.begin(), shape.end()), nullptr, on_gpu ? Place::device : Place::host};
}

Tensor Array4::cache(std::int64_t heads) const {
  const std::int64_t dim = shape[3];
  std::int64_t capacity = shape[2];
  if (heads > 1)
    capacity = strides[1] / dim;
  else if (shape[0] > 1)
    capacity = strides[0] / dim;
  const bool fits = (shape[2] == 1 || strides[2] == dim) && capacity >= shape[2] &&
                    (heads == 1 || strides[1] == capacity * dim) &&
                    (shape[0] == 1 || strides[0] == heads * capacity * dim);
  if (!fits)
    refuse(
        fmt::format("{}: strides {} of {} are not those of a cache (batch, heads, capacity, channels), which cs4a, "
                    "probe and GPUs take; make it contiguous",
                    name, shape_text(strides), text()));
  return {data, dtype, {shape[0], heads, capacity, dim}, nullptr, on_gpu ? Place::device : Place::host};
}

void require_gpu_alignment(const char* name, std::uintptr_t address) {
  constexpr std::uintptr_t kGpuAlignment = 16;
  if (address % kGpuAlignment != 0)
    refuse(fmt::format("{} must begin at a multiple of 16 bytes on a GPU; make a copy of it", name));
}

Array4 checked(const RawArray& raw) {
  if (raw.dimensions != 4)
    refuse(fmt::format("{}: expected 4 dimensions {}, found {}", raw.name, kOrder, raw.dimensions));
  if (raw.device_type != kCpu && raw.device_type != kCuda)
    refuse(fmt::format("{} is neither on the CPU nor on a CUDA device", raw.name));
  Array4 out{.name = raw.name,
             .data = raw.data,
             .dtype = dtype_of(raw),
             .shape = {},
             .strides = {},
             .on_gpu = raw.device_type == kCuda,
             .device = raw.device};
  for (int axis = 0; axis < 4; ++axis) {
    out.shape[axis] = raw.shape[axis];
    out.strides[axis] = raw.strides[axis];
  }
  if (out.shape[3] != 1 && out.strides[3] != 1)
    refuse(fmt::format("{}: the channels of a row must lie next to each other, found strides {}; make it contiguous",
                       raw.name, shape_text(out.strides)));
  if (out.on_gpu) require_gpu_alignment(raw.name, reinterpret_cast<std::uintptr_t>(raw.data));
  return out;
}

void require_fit(const Array4& q, const Array4& k, const Array4& v, const Array4& out, std::int64_t queries,
                 std::int64_t keys) {
  for (const Array4* other : {&k, &v, &out}) {
    if (other->dtype != q.dtype)
      refuse(fmt::format("q is {} and {} is {}: they must be of one type", q.text(), other->name, other->text()));
    if (other->on_gpu != q.on_gpu || other->device != q.device)
      refuse(fmt::format("q is on {} and {} on {}: they must be on one device", place(q), other->name, place(*other)));
  }
  require_shape(q, {q.shape[0], q.shape[1], queries, q.shape[3]});
  require_shape(k, {q.shape[0], q.shape[1], keys, q.shape[3]});
  require_shape(v, k.shape);
  require_shape(out, q.shape);
}

}  // namespace sparvar::python
