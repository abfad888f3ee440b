// The known name that a mistyped one most likely means.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace sparvar {

/// Levenshtein distance: insertions, deletions and replacements from one word to the other.
std::size_t edit_distance(std::string_view a, std::string_view b);

/// The name among `known` (not empty) with the fewest edits from `name`.
std::string nearest_name(std::string_view name, const std::vector<std::string>& known);

}  // namespace sparvar
