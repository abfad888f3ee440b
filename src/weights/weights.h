// Where a model's tensors come from: files, or random numbers for measuring.
#pragma once

#include <cstdint>
#include <string>

#include "core/tensor.h"

namespace sparvar {

class Weights {
 public:
  virtual ~Weights() = default;
  virtual bool has(const std::string& name) const = 0;
  /// Throws Error(input) where the tensor is missing, or `shape` is given and differs.
  virtual Tensor get(const std::string& name) const = 0;
  virtual Tensor get(const std::string& name, const Shape& shape) const = 0;
  /// The same for a matrix of LinearKind::narrow: one that is kept as e4m3 with scales comes so, on the host.
  virtual Tensor narrow(const std::string& name, const Shape& shape) const { return get(name, shape); }
  virtual Tensor f32(const std::string& name, const Shape& shape) const = 0;  // converted copy, on the host
  virtual std::int64_t bytes_of(const std::string& name) const = 0;           // as it is kept
  virtual std::int64_t parameters() const = 0;                                // elements in all
  virtual const std::string& path() const = 0;
};

}  // namespace sparvar
