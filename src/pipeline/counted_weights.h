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
  const Tensor& get(const std::string& name) const override { return count(name, source_.get(name)); }
  Tensor get(const std::string& name, const Shape& shape) const override {
    return count(name, source_.get(name, shape));
  }
  Tensor f32(const std::string& name, const Shape& shape) const override {
    count(name, source_.get(name));
    return source_.f32(name, shape);
  }
  std::int64_t parameters() const override { return source_.parameters(); }
  const std::string& path() const override { return source_.path(); }

 private:
  template <typename T>
  T&& count(const std::string& name, T&& tensor) const {
    took_(static_cast<std::int64_t>(source_.get(name).bytes()));
    return std::forward<T>(tensor);
  }

  const Weights& source_;
  std::function<void(std::int64_t)> took_;
};

}  // namespace sparvar
