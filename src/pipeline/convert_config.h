// config.json of checkpoints: what their shapes say, and where these say nothing, what holds for the released models.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/convert_source.h"

namespace sparvar {

/// `text_config`: path of the text encoder's config.json (Hugging Face's T5Config); `set`: ConvertOptions::set. Throws
/// Error(input) naming the tensor whose shape is none of an Infinity model, Error(usage) for a bad `set`.
nlohmann::ordered_json derive_config(const ConvertSource& transformer, const ConvertSource& vae,
                                     const std::string& text_config, const std::vector<std::string>& set);

}  // namespace sparvar
