#include "flags.h"

namespace sparvar::cli {

CLI::Option* add_number_list(CLI::App& command, const std::string& name, std::vector<float>& target,
                             const Range<float>& range, const std::string& help) {
  const auto parse = [&target, range, name](const std::string& text) {
    target.clear();
    std::size_t begin = 0;
    while (begin <= text.size()) {
      const std::size_t end = std::min(text.find(',', begin), text.size());
      target.push_back(parse_number(name, text.substr(begin, end - begin), range));
      begin = end + 1;
    }
  };
  return command.add_option_function<std::string>(name, parse, help)->type_name("N[,N...]");
}

std::int64_t parse_bytes(const std::string& flag, const std::string& text) {
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, value);
  std::string unit(stop, end);
  if (unit.ends_with('B') || unit.ends_with('b')) unit.pop_back();
  const double factor = unit.empty() ? 1 : unit == "K" || unit == "k" ? 1e3 : unit == "M" ? 1e6 : unit == "G" ? 1e9 : 0;
  if (status != std::errc{} || factor == 0 || !(value > 0) || value * factor > 1e15)
    throw CLI::ValidationError(flag, fmt::format("expected an amount of memory such as 2G or 500M, found '{}'", text));
  return static_cast<std::int64_t>(value * factor);
}

std::string bytes_text(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  return value >= 1e9 ? fmt::format("{:.2f} GB", value / 1e9) : fmt::format("{:.0f} MB", value / 1e6);
}

}  // namespace sparvar::cli
