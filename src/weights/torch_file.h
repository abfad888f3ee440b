// Checkpoints as torch.save writes them (the zip form, PyTorch 1.6 and newer), memory-mapped. No code of a file runs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "weights/weights.h"
#include "weights/zip_archive.h"

namespace sparvar {

/// Where a state dict may be inside of a file, in the order that is tried: "vae", "trainer.gpt_fsdp", ...
std::vector<std::string> known_places();

class TorchFile final : public Weights {
 public:
  /// The file's own dict where it holds tensors, else the first of `places` (dots lead into nested dicts) that does.
  /// Throws Error(input) naming file, byte or tensor, expected and found.
  static TorchFile open(const std::string& path, const std::vector<std::string>& places = known_places());

  bool has(const std::string& name) const override { return tensors_.contains(name); }
  /// A view of the mapped file, or a copy where the tensor is no run of it (a transposed matrix).
  Tensor get(const std::string& name) const override;
  Tensor get(const std::string& name, const Shape& shape) const override;
  Tensor f32(const std::string& name, const Shape& shape) const override;
  std::int64_t bytes_of(const std::string& name) const override;
  std::int64_t parameters() const override;
  const std::string& path() const override { return path_; }

  std::vector<std::string> names() const;
  DType dtype(const std::string& name) const { return stored(name).dtype; }
  const Shape& shape(const std::string& name) const { return stored(name).shape; }
  /// Reads the tensor's storage and compares the checksum that the archive keeps of it. Throws Error(input).
  void verify(const std::string& name) const;
  /// The place the tensors come from; empty: the file's own dict.
  const std::string& place() const { return place_; }

 private:
  struct Stored {
    DType dtype = DType::f32;
    Shape shape, stride;  // in elements
    std::int64_t offset = 0;
    std::string entry;  // of the archive
    bool contiguous = true;
  };
  friend class TorchReader;
  const Stored& stored(const std::string& name) const;

  std::string path_, place_;
  std::shared_ptr<const ZipArchive> archive_;
  std::map<std::string, Stored> tensors_;
};

}  // namespace sparvar
