// "Did you mean": the nearest of the names there are.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace sparvar::cli {

/// The name closest to `word`, or nothing where none is close.
std::string nearest(const std::string& word, const std::vector<std::string>& names);

/// "; did you mean X?" or nothing.
std::string did_you_mean(const std::string& word, const std::vector<std::string>& names);

/// Throws a usage error where no command was given or an argument was not understood.
void refuse_unknown(const CLI::App& program);

}  // namespace sparvar::cli
