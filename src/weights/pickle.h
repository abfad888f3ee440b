// The part of Python's pickle format that state dicts are written in, as data: nothing is imported, called or built.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace sparvar {

/// What a pickle may name. Everything else is refused.
enum class PickleGlobal : std::uint8_t { ordered_dict, rebuild_tensor, rebuild_parameter, storage };

/// A tensor as torch._utils._rebuild_tensor_v2 is told of it; nothing is checked against the storage yet.
struct PickledTensor {
  std::string_view storage;    // the entry data/<storage> of the archive
  std::optional<DType> dtype;  // none: a storage that has no type
  std::int64_t storage_elements = 0;
  std::int64_t offset = 0;  // in elements
  Shape shape, stride;
};

/// One value. `items`: of tuples and lists in order, of dicts key, value, key, value; indices into Pickle::values.
struct PickleValue {
  enum class Kind : std::uint8_t {
    none,
    boolean,
    integer,
    real,
    text,
    bytes,
    tuple,
    list,
    dict,
    set,
    global,
    storage,
    tensor
  } kind = Kind::none;
  PickleGlobal global = PickleGlobal::ordered_dict;
  bool ordered = false;     // a dict that is an OrderedDict
  std::int64_t number = 0;  // of an integer; of a tensor its place in Pickle::tensors
  double real = 0;
  std::string_view text;  // in the bytes that were read
  std::optional<DType> dtype;
  std::vector<std::uint32_t> items;
};

struct Pickle {
  std::vector<PickleValue> values;
  std::vector<PickledTensor> tensors;
  std::uint32_t root = 0;
};

/// Reads protocols 2 to 5. Values point into `bytes`. Throws Error(input) that begins with `where` and names the byte
/// and the opcode or global that is not allowed. What is built is bounded by the length of `bytes`.
Pickle read_pickle(std::span<const std::byte> bytes, const std::string& where);

const char* name_of(PickleValue::Kind kind);

}  // namespace sparvar
