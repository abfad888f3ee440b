// What a picture file says about how it was drawn.
#pragma once

#include <string>

#include "sparvar/image.h"

namespace sparvar::cli {

/// The command that draws the picture again, from the texts in it; empty where they are not a picture's of ours.
/// Where its plan was none of the presets the command names PLAN.json, which `info PICTURE --plan-out PLAN.json`
/// writes; where its model is not the bundled one, MODEL_DIR.
std::string redraw_command(const ImageMetadata& texts);

/// The attention plan as JSON text; empty where there is none.
std::string plan_text(const ImageMetadata& texts);

/// Texts and command for people, or as one JSON object.
std::string picture_report(const std::string& path, bool json);

}  // namespace sparvar::cli
