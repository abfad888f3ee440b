// Metadata as one text, for formats without named texts of their own.
#pragma once

#include <string>
#include <string_view>

#include "sparvar/image.h"

namespace sparvar {

/// Throws Error(usage) where a keyword is not 1 to 79 printable ASCII characters without spaces at its ends.
void check_keywords(const ImageMetadata& metadata);

/// {"keyword": "value", ...}, in order.
std::string to_json_text(const ImageMetadata& metadata);
/// What to_json_text wrote; any other text comes as {"Comment", text}, none where it is empty.
ImageMetadata from_json_text(std::string_view text);

/// An XMP packet that holds the same object, readable by other programs as the picture's description.
std::string to_xmp(const ImageMetadata& metadata);
ImageMetadata from_xmp(std::string_view packet);

}  // namespace sparvar
