// Pictures brought to the size of a model.
#pragma once

#include "sparvar/image.h"

namespace sparvar {

/// Lanczos (3 lobes, widened where the picture shrinks), borders weighted anew: the filter Infinity's own tools use.
Image resize_lanczos(const Image& image, int width, int height);

/// The largest centred part of the picture with the ratio width : height, resized to width x height.
Image cover(const Image& image, int width, int height);

}  // namespace sparvar
