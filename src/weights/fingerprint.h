// A cheap name for a model's files.
#pragma once

#include <string>

namespace sparvar {

/// 16 hex digits of what makes a model folder draw as it does: FNV-1a (64 bits) over name, size and samples of
/// config.json, spiece.model, *.safetensors and their indices, in order of name. Samples are the first and last 64 KiB
/// (headers are there) and 64 blocks of 4 KiB evenly between; a file of up to 512 KiB is read whole. It tells models
/// and versions apart in milliseconds; it does not prove that no byte was changed. Throws Error where a file cannot be
/// read.
std::string fingerprint(const std::string& folder);

}  // namespace sparvar
