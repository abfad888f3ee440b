// Text from outside, as it may stand in a message.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

namespace sparvar {

/// Printable ASCII of `text`, the rest as `?`, cut where it is long: a message is one short line whatever a plan holds.
inline std::string printable(std::string_view text, std::size_t shown = 64) {
  std::string out(text.substr(0, shown));
  std::replace_if(
      out.begin(), out.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  if (text.size() > shown) out += "...";
  return out;
}

}  // namespace sparvar
