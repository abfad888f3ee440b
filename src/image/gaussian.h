// The Gaussian window of SSIM and of what measures detail.
#pragma once

#include <array>
#include <cmath>

namespace sparvar {

constexpr int kGaussianSide = 11;

/// Weights of one axis, sigma 1.5; their sum is 1.
inline std::array<double, kGaussianSide> gaussian_window() {
  constexpr double sigma = 1.5;
  std::array<double, kGaussianSide> window{};
  double sum = 0;
  for (int i = 0; i < kGaussianSide; ++i) {
    const double distance = i - kGaussianSide / 2;
    sum += window[static_cast<std::size_t>(i)] = std::exp(-distance * distance / (2 * sigma * sigma));
  }
  for (double& weight : window) weight /= sum;
  return window;
}

}  // namespace sparvar
