// The scales of a picture of an aspect ratio and size.
#pragma once

#include <string>

#include "sparvar/schedule.h"
#include "weights/config.h"

namespace sparvar {

struct PictureShape {
  ScaleSchedule schedule;
  Grid rope_grid;  // the last grid of the 1M schedule of the ratio, whatever the size
};

/// `aspect` "W:H", `size` of kSizes; an empty one is the model's own. `levels`: the scales the model has embeddings
/// for. Throws Error(usage) that names the nearest where the model has no such ratio or size.
PictureShape picture_shape(const ModelConfig& config, const std::string& aspect, const std::string& size, int levels);

/// "1:1, 4:5, ..." (width to height), one name for every ratio of the tables.
std::string aspect_names();

}  // namespace sparvar
