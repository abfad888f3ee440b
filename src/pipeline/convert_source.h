// A checkpoint under the names that the engine knows its tensors by.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "weights/checkpoint.h"

namespace sparvar {

class ConvertSource {
 public:
  /// `part`: "transformer", "vae", "text encoder". Prefixes that wrappers of PyTorch put into names are taken away.
  ConvertSource(std::string part, const std::string& path, const std::vector<std::string>& places);

  const std::string& part() const { return part_; }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  bool has(const std::string& name) const { return names_.contains(name); }
  /// Throws Error(input), as the next: "FILE: tensor NAME: missing; expected ...".
  Shape shape(const std::string& name) const;
  /// The shape, of `rank` dimensions.
  Shape shape(const std::string& name, int rank) const;
  /// The name in the checkpoint.
  const std::string& original(const std::string& name) const;
  std::vector<std::string> names() const;
  [[noreturn]] void fail(const std::string& name, const std::string& what) const;

 private:
  std::string part_;
  Checkpoint checkpoint_;
  std::map<std::string, std::string> names_;
};

}  // namespace sparvar
