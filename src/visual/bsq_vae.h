// BSQ-VAE image tokenizer of Infinity (infinity/models/bsq_vae): picture -> features -> bits per scale -> features ->
// picture.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "sparvar/image.h"
#include "sparvar/schedule.h"
#include "weights/config.h"
#include "weights/weights.h"

namespace sparvar {

class BsqVae {
 public:
  /// Files without `encoder.*` tensors can only decode.
  BsqVae(const VaeConfig& config, const Weights& weights, Backend& backend);
  ~BsqVae();
  BsqVae(BsqVae&&) noexcept;
  bool can_encode() const;
  /// f32 [B, d, h, w] summed codes -> f32 [B, 3, H, W] in [-1, 1] (clamped), R G B; host to host.
  Tensor decode(const Tensor& codes);
  /// f32 [1, d, h, w] -> U8 [1, H, W, 3]: floor(255 (x + 1) / 2); tensors of the backend, a body for a program.
  Tensor draw(const Tensor& codes);
  /// f32 [1, 3, H, W] in [-1, 1] -> f32 [1, d, H / patch, W / patch]; host to host.
  Tensor encode(const Tensor& picture);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Picture `index` of U8 [B, H, W, 3].
Image to_image(const Tensor& pixels, int index);
/// 2 (x / 255) - 1, f32 [1, 3, H, W].
Tensor from_image(const Image& image);

}  // namespace sparvar
