#include "weights/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "core/nearest_name.h"
#include "sparvar/error.h"
#include "weights/strict_json.h"

namespace sparvar {
std::optional<int> as_integer(const nlohmann::json& value, int low, int high) {
  if (!value.is_number_integer()) return std::nullopt;
  // Above 2^63 the signed reading would wrap.
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > std::numeric_limits<int>::max()) return std::nullopt;
  const auto number = value.get<std::int64_t>();
  if (number < low || number > high) return std::nullopt;
  return static_cast<int>(number);
}

namespace {

std::optional<bool> as_boolean(const nlohmann::json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (const std::optional<int> number = as_integer(value, 0, 1)) return *number == 1;
  return std::nullopt;
}

}  // namespace

Fields::Fields(const nlohmann::json& value, std::string where, std::string name, std::vector<std::string> known)
    : value_(&value), where_(std::move(where)), name_(std::move(name)) {
  if (!value.is_object())
    throw Error(ErrorKind::input, fmt::format("{}: {}: expected an object, found {}", where_,
                                              name_.empty() ? "the file" : name_, describe(value)));
  for (const auto& [key, ignored] : value.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    throw Error(ErrorKind::input, fmt::format("{}: unknown key {}{}; did you mean '{}'?", where_, quoted_name(key),
                                              name_.empty() ? "" : " in " + name_, nearest_name(key, known)));
  }
}

void Fields::fail(const std::string& key, const std::string& what) const {
  throw Error(ErrorKind::input, fmt::format("{}: {}{}{}: {}", where_, name_, name_.empty() ? "" : ".", key, what));
}

const nlohmann::json& Fields::at(const std::string& key) const {
  const auto found = value_->find(key);
  if (found == value_->end()) fail(key, "missing");
  return *found;
}

int Fields::checked_integer(const std::string& key, const nlohmann::json& value, int low, int high) const {
  const std::optional<int> number = as_integer(value, low, high);
  if (!number) fail(key, fmt::format("expected an integer from {} to {}, found {}", low, high, describe(value)));
  return *number;
}

double Fields::checked_number(const std::string& key, const nlohmann::json& value, double low, double high) const {
  const bool fits = value.is_number() && value.get<double>() >= low && value.get<double>() <= high;
  if (!fits) fail(key, fmt::format("expected a number from {:g} to {:g}, found {}", low, high, describe(value)));
  return value.get<double>();
}

int Fields::integer(const std::string& key, int low, int high, std::optional<int> fallback) const {
  if (fallback && !has(key)) return *fallback;
  return checked_integer(key, at(key), low, high);
}

double Fields::number(const std::string& key, double low, double high, std::optional<double> fallback) const {
  if (fallback && !has(key)) return *fallback;
  return checked_number(key, at(key), low, high);
}

bool Fields::boolean(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  const std::optional<bool> value = as_boolean(at(key));
  if (!value) fail(key, "expected true or false, found " + describe(at(key)));
  return *value;
}

std::string Fields::text(const std::string& key, std::optional<std::string> fallback) const {
  if (fallback && !has(key)) return *fallback;
  if (!at(key).is_string()) fail(key, "expected a text, found " + describe(at(key)));
  return at(key).get<std::string>();
}

std::vector<int> Fields::integers(const std::string& key, std::size_t shortest, std::size_t longest, int low,
                                  int high) const {
  const nlohmann::json& list = at(key);
  if (!list.is_array() || list.size() < shortest || list.size() > longest)
    fail(key, fmt::format("expected a list of {} to {} integers, found {}", shortest, longest, describe(list)));
  std::vector<int> out;
  for (const nlohmann::json& item : list) out.push_back(checked_integer(key, item, low, high));
  return out;
}

std::vector<float> Fields::numbers(const std::string& key, std::size_t count, double low, double high,
                                   float fallback) const {
  if (!has(key)) return {fallback};
  const nlohmann::json& value = at(key);
  if (!value.is_array()) return {static_cast<float>(checked_number(key, value, low, high))};
  if (value.size() != count)
    fail(key, fmt::format("expected a number or a list of {}, one for each scale, found {}", count, describe(value)));
  std::vector<float> out;
  for (const nlohmann::json& item : value) out.push_back(static_cast<float>(checked_number(key, item, low, high)));
  return out;
}

void Fields::only(const std::string& key, bool supported) const {
  if (has(key) && as_boolean(at(key)) != supported)
    fail(key, fmt::format("only {} is supported, found {}", supported, describe(at(key))));
}

void Fields::only_text(const std::string& key, const std::string& supported) const {
  if (has(key) && at(key) != supported)
    fail(key, fmt::format("only '{}' is supported, found {}", supported, describe(at(key))));
}

}  // namespace sparvar
