// All pictures of a run on one sheet.
#pragma once

#include <vector>

#include "sparvar/image.h"

namespace sparvar {

/// Pictures in rows of `columns` (0: about as many as rows) on white with a margin, each at the same scale and centred
/// in its cell; made smaller where the sheet would be wider or higher than `largest` pixels. Throws Error(usage)
/// without a picture.
Image contact_sheet(const std::vector<const Image*>& pictures, int columns = 0, int largest = 4096);

/// Every pixel the mean of the pixels it covers; sides of at least 1 and at most the picture's.
Image shrunk(const Image& image, int width, int height);

}  // namespace sparvar
