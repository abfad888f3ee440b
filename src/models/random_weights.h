// Weights that are random numbers, for measuring a geometry whose files are not at hand. Large matrices are made on the
// device and never exist on the host.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "backend/backend.h"
#include "weights/config.h"
#include "weights/weights.h"

namespace sparvar {

class RandomWeights final : public Weights {
 public:
  /// `made`, where given, gets the bytes of every tensor.
  RandomWeights(const ModelConfig& config, Backend& backend, std::function<void(std::int64_t)> made = {});
  /// Optional tensors of released models are not there (ca_gamma, the picture encoder).
  bool has(const std::string& name) const override;
  Tensor get(const std::string& name) const override;
  /// Matrices are normal with deviation 1 / sqrt(inputs), so that activations stay of the size of one; norms are 1.
  Tensor get(const std::string& name, const Shape& shape) const override;
  Tensor f32(const std::string& name, const Shape& shape) const override;
  std::int64_t bytes_of(const std::string&) const override { return 0; }
  std::int64_t parameters() const override { return parameters_; }
  const std::string& path() const override { return path_; }

 private:
  Tensor on_host(const Shape& shape, float deviation) const;
  void count(std::int64_t elements, DType type) const;

  Backend& backend_;
  std::function<void(std::int64_t)> made_;
  std::string path_ = "random weights";
  std::map<std::string, Tensor> fixed_;
  mutable std::int64_t parameters_ = 0;
  mutable std::uint64_t seed_ = 0;
};

}  // namespace sparvar
