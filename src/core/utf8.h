// Is this text UTF-8?
#pragma once

#include <cstddef>
#include <string_view>

namespace sparvar {

/// Position of the first byte that is not UTF-8 (overlong forms, surrogates and truncation included), or npos.
std::size_t first_invalid_byte(std::string_view text);

}  // namespace sparvar
