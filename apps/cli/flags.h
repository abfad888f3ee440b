// Values of flags: numbers that are what they claim to be, and nothing after them.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <functional>
#include <string>
#include <system_error>
#include <vector>

namespace sparvar::cli {

/// A range of numbers, both ends in it.
template <typename T>
struct Range {
  T low;
  T high;
  bool holds(T value) const { return value >= low && value <= high; }  // false for a NaN
  std::string text() const { return fmt::format("a number from {} to {}", low, high); }
};

/// The whole of `text` as a number in the range; throws CLI::ValidationError naming the flag.
template <typename T>
T parse_number(const std::string& flag, const std::string& text, const Range<T>& range) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, value);
  if (status != std::errc{} || stop != end || !range.holds(value)) {
    throw CLI::ValidationError(flag, fmt::format("expected {}, found '{}'", range.text(), text));
  }
  return value;
}

/// Declares a flag that takes one number.
template <typename T>
CLI::Option* add_number(CLI::App& command, const std::string& names, T& target, const Range<T>& range,
                        const std::string& help) {
  const std::string flag = names.substr(names.find("--") == std::string::npos ? 0 : names.find("--"));
  return command
      .add_option_function<std::string>(
          names, [&target, range, flag](const std::string& text) { target = parse_number(flag, text, range); }, help)
      ->type_name("N");
}

/// "2G", "500M", "1.5GB", a plain number: bytes, in powers of 1000; throws CLI::ValidationError naming the flag.
std::int64_t parse_bytes(const std::string& flag, const std::string& text);

/// "1.23 GB" or "345 MB".
std::string bytes_text(std::int64_t bytes);

/// Declares a flag that takes a number, or a comma list of them (one per scale).
CLI::Option* add_number_list(CLI::App& command, const std::string& name, std::vector<float>& target,
                             const Range<float>& range, const std::string& help);

}  // namespace sparvar::cli
