// The index of a checkpoint in pieces: {"weight_map": {"tensor name": "shard file"}}.
#pragma once

#include <map>
#include <string>

namespace sparvar {

/// Tensor name -> path of its shard, which lies next to the index. Throws Error(input): names that lead elsewhere,
/// shards that are not there.
std::map<std::string, std::string> read_shard_index(const std::string& path);

}  // namespace sparvar
