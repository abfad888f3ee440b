// Bits, codes and their resizing between scales (multiscale_bsq.py; inference path: trilinear, align_corners false,
// both ways).
#pragma once

#include <vector>

#include "core/tensor.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// f32 [B, d, h, w] -> [B, d, to.h, to.w], bilinear without antialias (half-pixel centres).
Tensor resize_bilinear(const Tensor& x, Grid to);
/// Adaptive average ("area") resize.
Tensor resize_area(const Tensor& x, Grid to);
/// bits U8 [B, n, bits] of a token grid -> codes f32 [B, d, h, w] of +-1/sqrt(d) on the VAE grid (patchify:
/// pixel_shuffle(2), 2h x 2w).
Tensor bits_to_codes(const Tensor& bits, Grid tokens, bool patchify);
/// summed codes [B, d, H, W] resized to the next token grid -> f32 [B, n, bits] words (patchify: pixel_unshuffle(2)).
Tensor codes_to_words(const Tensor& summed, Grid tokens, bool patchify);

struct Quantized {
  std::vector<Tensor> residual;   // f32 [1, d, hk, wk], resized by area
  std::vector<Tensor> bits;       // U8 [1, hk, wk, d]
  std::vector<Tensor> var_input;  // f32 [1, d, hk, wk]: sum of the codes of earlier scales, resized by area
  Tensor sum;                     // f32 [1, d, h, w]
};
/// Multi-scale residual quantisation of encoder features f32 [1, d, h, w]; the VAE's own grids.
Quantized quantize(const Tensor& features, const ScaleSchedule& schedule);

}  // namespace sparvar
