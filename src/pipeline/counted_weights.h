// Weights that tell how much of them was taken, for the progress of loading.
#pragma once

#include <functional>

#include "weights/weights.h"

namespace sparvar {

class CountedWeights final : public Weights {
 public:
  /// `took` gets the bytes of every tensor that is read.
  CountedWeights(const Weights& source, std::function<void(std::int64_t)> took)
      : source_(source), took_(std::move(took)) {}

  bool has(const std::string& name) const override { return source_.has(name); }
  Tensor get(const std::string& name) const override {
    count(name);
    return source_.get(name);
  }
  Tensor get(const std::string& name, const Shape& shape) const override {
    count(name);
    return source_.get(name, shape);
  }
  Tensor narrow(const std::string& name, const Shape& shape) const override {
    count(name);
    return source_.narrow(name, shape);
  }
  Tensor f32(const std::string& name, const Shape& shape) const override {
    count(name);
    return source_.f32(name, shape);
  }
  std::int64_t bytes_of(const std::string& name) const override { return source_.bytes_of(name); }
  std::int64_t parameters() const override { return source_.parameters(); }
  const std::string& path() const override { return source_.path(); }

 private:
  void count(const std::string& name) const { took_(bytes_of(name)); }

  const Weights& source_;
  std::function<void(std::int64_t)> took_;
};

}  // namespace sparvar
