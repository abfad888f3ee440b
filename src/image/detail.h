// What becomes of a picture's fine detail.
#pragma once

#include "sparvar/image.h"

namespace sparvar {

/// How far apart the fine detail of two pictures is: what a Gaussian blur (11x11, sigma 1.5, edges mirrored) takes away
/// from each, root mean square of the difference over all pixels and channels, in 8-bit levels. 0: the same detail.
/// Throws Error(usage) where sizes differ.
double detail_error(const Image& a, const Image& b);

}  // namespace sparvar
