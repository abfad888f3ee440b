#include "weights/strict_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <vector>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::size_t kShown = 100;        // bytes of a foreign name that are repeated in our messages
constexpr std::size_t kShownReason = 250;  // of the JSON parser's message

/// Printable ASCII of `text`; the rest as `?`, and cut where it is long.
std::string printable(std::string_view text, std::size_t shown = kShown) {
  std::string out(text.substr(0, shown));
  for (char& c : out)
    if (c < 0x20 || c > 0x7e) c = '?';
  if (text.size() > shown) out += "...";
  return out;
}

}  // namespace

std::string quoted_name(std::string_view name) { return '\'' + printable(name) + '\''; }

std::string describe(const nlohmann::json& value) {
  if (value.is_object()) return "an object";
  const auto is_plain = [](const nlohmann::json& item) { return item.is_primitive(); };
  const bool is_short = value.size() <= 4 && std::all_of(value.begin(), value.end(), is_plain);
  if (value.is_array() && !is_short) return fmt::format("a list of {}", value.size());
  if (value.is_string()) return "the text " + quoted_name(value.get_ref<const std::string&>());
  return printable(value.dump());
}

nlohmann::json parse_json(std::string_view text, const std::string& where, int max_depth) {
  // The parser takes NUL for the end of its input and would ignore what follows.
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos)
    throw Error(ErrorKind::input, fmt::format("{}: not valid JSON: a NUL at byte {}", where, nul));
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects (and, empty, lists) that are open
  const auto watch = [&](int /*depth*/, Event event, nlohmann::json& value) {
    if (event == Event::object_start || event == Event::array_start) {
      if (keys.size() == static_cast<std::size_t>(max_depth))
        throw Error(ErrorKind::input, fmt::format("{}: JSON nested deeper than {} levels", where, max_depth));
      keys.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys.pop_back();
    } else if (event == Event::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        throw Error(ErrorKind::input, fmt::format("{}: the name {} is there twice", where, quoted_name(key)));
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::exception& failure) {
    std::string_view reason = failure.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    if (const std::size_t end = reason.find("] "); end != std::string_view::npos) reason.remove_prefix(end + 2);
    throw Error(ErrorKind::input, fmt::format("{}: not valid JSON: {}", where, printable(reason, kShownReason)));
  }
}

}  // namespace sparvar
