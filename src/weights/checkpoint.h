// Checkpoints as people have them, whatever their form: .pth, .safetensors, folders of shards.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "weights/safetensors.h"
#include "weights/torch_file.h"
#include "weights/weights.h"

namespace sparvar {

class Checkpoint final : public Weights {
 public:
  /// `path`: a file of torch.save or safetensors, an .index.json of shards, or a folder that holds one of them. State
  /// dicts inside of others are looked for at `places` (TorchFile::open). Throws Error(input) naming file, tensor,
  /// expected and found.
  static Checkpoint open(const std::string& path, const std::vector<std::string>& places = known_places());

  bool has(const std::string& name) const override { return tensors_.contains(name); }
  Tensor get(const std::string& name) const override { return part(name).weights().get(name); }
  Tensor get(const std::string& name, const Shape& shape) const override;
  Tensor f32(const std::string& name, const Shape& shape) const override;
  std::int64_t bytes_of(const std::string& name) const override { return part(name).weights().bytes_of(name); }
  std::int64_t parameters() const override;
  const std::string& path() const override { return path_; }

  std::vector<std::string> names() const;
  DType dtype(const std::string& name) const;
  Shape shape(const std::string& name) const;
  /// Of the file that the tensor is in.
  const std::string& path_of(const std::string& name) const { return part(name).weights().path(); }
  /// Compares the checksum of the tensor's bytes where the file has one. Throws Error(input).
  void verify(const std::string& name) const;
  /// The place inside of the file (TorchFile::place).
  std::string place() const;

 private:
  struct Part {
    std::shared_ptr<const TensorFile> plain;  // one of the two
    std::shared_ptr<const TorchFile> torch;
    const Weights& weights() const { return plain ? static_cast<const Weights&>(*plain) : *torch; }
  };
  void add_file(const std::string& path, const std::vector<std::string>& places);
  void add_shards(const std::string& path, const std::vector<std::string>& places);
  const Part& part(const std::string& name) const;

  std::string path_;
  std::map<std::string, Part> tensors_;
};

}  // namespace sparvar
