// The image tokenizer alone: picture -> features -> bits of all scales -> sum of codes -> picture.
#pragma once

#include "bits/codes.h"
#include "sparvar/image.h"
#include "visual/bsq_vae.h"

namespace sparvar {

struct Reconstruction {
  Image picture;
  Quantized quantized;  // of every scale, those left out too
  double encode_seconds = 0, quantize_seconds = 0, decode_seconds = 0;
};

/// `picture` has the sides of the schedule's last grid times the VAE's patch. `grids`: the VAE's own (2x the tokens of
/// a model with patchify). The codes of the last `skip_scales` scales are left out of the sum. Throws Error(usage)
/// where the VAE cannot encode, sides do not fit, or no scale would be left.
Reconstruction reconstruct(BsqVae& vae, Backend& backend, const Image& picture, const ScaleSchedule& grids,
                           int skip_scales);

/// The VAE's grids of a model's token grids.
ScaleSchedule vae_grids(const ScaleSchedule& tokens, bool patchify);

}  // namespace sparvar
