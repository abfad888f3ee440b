// Prompts from files.
#pragma once

#include <string>
#include <vector>

namespace sparvar::cli {

/// One prompt a line; "-" is standard input. Blank lines are skipped, Windows line ends and a byte order mark are
/// taken off. Throws Error(input) where there is no prompt in it.
std::vector<std::string> read_prompts(const std::string& path);

}  // namespace sparvar::cli
