// One object of a config file: every key known, every value of its type and in its range.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sparvar {

/// An integer of the range; nothing for other values.
std::optional<int> as_integer(const nlohmann::json& value, int low, int high);

/// Messages begin with "<where>: <object>.<key>:". Every method throws Error(input); a key without a fallback must be
/// there.
class Fields {
 public:
  /// Refuses what is no object and any key that is not in `known`. `name`: of the object, empty at the top.
  Fields(const nlohmann::json& value, std::string where, std::string name, std::vector<std::string> known);

  int integer(const std::string& key, int low, int high, std::optional<int> fallback = std::nullopt) const;
  double number(const std::string& key, double low, double high, std::optional<double> fallback = std::nullopt) const;
  bool boolean(const std::string& key, bool fallback) const;  // true, false, 1 or 0, as upstream mixes them
  std::string text(const std::string& key, std::optional<std::string> fallback = std::nullopt) const;
  /// A list of `shortest` to `longest` integers.
  std::vector<int> integers(const std::string& key, std::size_t shortest, std::size_t longest, int low, int high) const;
  /// A number, or a list of `count` numbers.
  std::vector<float> numbers(const std::string& key, std::size_t count, double low, double high, float fallback) const;
  /// Refuses a key whose value is not the one that is supported (it may be missing).
  void only(const std::string& key, bool supported) const;
  void only_text(const std::string& key, const std::string& supported) const;

  bool has(const std::string& key) const { return value_->contains(key); }
  const nlohmann::json& at(const std::string& key) const;
  [[noreturn]] void fail(const std::string& key, const std::string& what) const;

 private:
  int checked_integer(const std::string& key, const nlohmann::json& value, int low, int high) const;
  double checked_number(const std::string& key, const nlohmann::json& value, double low, double high) const;

  const nlohmann::json* value_;
  std::string where_;
  std::string name_;
};

}  // namespace sparvar
