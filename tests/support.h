// Where the tests' fixtures are, and the comparison they share.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace sparvar::testing {

inline std::string data_dir() { return SPARVAR_TEST_DATA; }
inline std::string models_dir() { return SPARVAR_MODELS; }

/// Normal random numbers; every call with another seed gives other ones.
inline Tensor random_tensor(Shape shape, unsigned seed, float scale = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Tensor out = Tensor::empty(DType::f32, std::move(shape));
  for (std::int64_t i = 0; i < out.size(); ++i) out.data<float>()[i] = normal(generator);
  return out;
}

/// As bf16 has it.
inline Tensor rounded(const Tensor& x) { return x.to(DType::bf16).to(DType::f32); }

/// Largest absolute difference; tensors of any float type with equal sizes.
inline double max_difference(const Tensor& a, const Tensor& b) {
  if (a.size() != b.size()) return INFINITY;
  const Tensor x = a.to(DType::f32);
  const Tensor y = b.to(DType::f32);
  double worst = 0;
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const double d = std::abs(static_cast<double>(x.data<float>()[i]) - y.data<float>()[i]);
    if (!(d <= worst)) worst = d;  // a NaN wins
  }
  return worst;
}

}  // namespace sparvar::testing
