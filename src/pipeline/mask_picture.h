// The mask of a scale as a picture: queries down, keys across, both in row order.
#pragma once

#include "attention/survey.h"
#include "sparvar/image.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// Where keys are in the picture. Every scale begins a pixel of its own, with a line before it, so that no pixel mixes
/// scales and the smallest remain visible.
struct MaskLayout {
  int tokens_per_pixel = 1;
  int width = 0;
  int top = 0;              // below the captions
  int height = 0;           // captions included
  std::vector<int> column;  // first pixel of each key scale
};

/// Throws Error(usage) where the picture would be larger than a PNG reader takes.
MaskLayout mask_layout(const ScaleSchedule& schedule, int k, int tokens_per_pixel);
/// The fewest tokens that make a picture of at most `side` pixels.
int tokens_per_pixel_for(const ScaleSchedule& schedule, int k, int side);

/// White: no pair of the pixel is computed; the darker, the more of them are (mean over lists); a single one shows.
Image draw_mask(const Mask& mask, const ScaleSchedule& schedule, int k, int tokens_per_pixel);

}  // namespace sparvar
