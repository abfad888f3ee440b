// JSON from outside, checked before it is used, and what is said about it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace sparvar {

/// A name from outside as one short printable line, in quotes.
std::string quoted_name(std::string_view name);

/// What a JSON value is, for messages: `a list`, `the text "x"`, `-1`.
std::string describe(const nlohmann::json& value);

/// Strict JSON: UTF-8, no key twice in one object, no deeper than `max_depth`. Throws Error(input) that begins with
/// `where`.
nlohmann::json parse_json(std::string_view text, const std::string& where, int max_depth);

}  // namespace sparvar
