// One file that a command writes.
#pragma once

#include <string>
#include <vector>

namespace sparvar::cli {

/// Checks, before any work is done, that `path` can be written: it ends in `extension` (".png"), its folder is there
/// and may be written, it is no folder, and it is none of the files in `inputs`. Nothing to check where `path` is
/// empty.
void check_output_file(const std::string& flag, const std::string& path, const std::string& extension,
                       const std::vector<std::string>& inputs);

}  // namespace sparvar::cli
