// Sizes of the released Infinity models (upstream infinity/models/infinity.py and scripts/infer.sh), for planning and
// measuring without their weights.
#pragma once

#include <string>
#include <vector>

#include "weights/config.h"

namespace sparvar {

/// infinity-125m (layer12), infinity-2b, infinity-8b.
std::vector<std::string> geometry_names();

/// A named geometry, 1024x1024 pictures, or that of a config.json file. Throws Error(usage) for another name.
ModelConfig geometry(const std::string& name_or_file);

}  // namespace sparvar
