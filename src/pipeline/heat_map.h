// Attention as a picture: queries down, keys across.
#pragma once

#include "pipeline/analyze.h"
#include "sparvar/image.h"

namespace sparvar {

/// One strip a head: a row for each sampled query in row order, keys of all scales across in row order, `per_pixel` of
/// a scale to a pixel. White: a sixteenth of even attention or less; black: 256 times as much or more.
Image heat_map(const SampledAttention& sample, const ScaleSchedule& schedule, int per_pixel);

}  // namespace sparvar
