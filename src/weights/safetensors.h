// Read-only safetensors files, memory-mapped and checked before use.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "weights/weights.h"

namespace sparvar {

/// A set of named tensors from one file, or from the shards that an index lists. Data stays mapped while any tensor
/// lives.
class TensorFile final : public Weights {
 public:
  /// `path`: a .safetensors file, or an .index.json of shards. Throws Error(input) naming file, tensor, expected and
  /// found.
  static TensorFile open(const std::string& path);
  /// `stem` + ".safetensors", else `stem` + ".safetensors.index.json", of a model folder.
  static TensorFile open_in(const std::string& dir, const std::string& stem);

  bool has(const std::string& name) const override { return tensors_.contains(name); }
  /// Weights of eight bits (docs/model-format.md; e4m3 without a scale too) come widened to f32, all others as they lie
  /// in the file.
  Tensor get(const std::string& name) const override;
  Tensor get(const std::string& name, const Shape& shape) const override;
  Tensor narrow(const std::string& name, const Shape& shape) const override;
  Tensor f32(const std::string& name, const Shape& shape) const override;
  std::int64_t bytes_of(const std::string& name) const override;
  std::int64_t parameters() const override;  // scales are none
  bool keeps_e4m3() const;                   // has it matrices that narrow() gives as e4m3?
  const std::string& path() const override { return path_; }
  std::vector<std::string> names() const;
  std::int64_t bytes() const;  // of all tensors

 private:
  const Tensor& stored(const std::string& name) const;
  void check_shape(const std::string& name, const Tensor& tensor, const Shape& shape) const;
  /// The scale of a weight of eight bits; null: the tensor is none, or has none. Throws Error(input) where the scale
  /// does not fit.
  const Tensor* scale_of(const std::string& name, const Tensor& weight) const;

  std::string path_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace sparvar
