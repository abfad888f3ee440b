// EXIF orientation: how a camera held the picture.
#pragma once

#include <cstdint>
#include <span>

#include "sparvar/image.h"

namespace sparvar {

/// The orientation (1 to 8) that EXIF data holds, with or without the "Exif\0\0" in front; 1 where it holds none or is
/// damaged.
int exif_orientation(std::span<const std::uint8_t> exif);

/// The picture as it is meant to be seen.
Image oriented(Image image, int orientation);

}  // namespace sparvar
