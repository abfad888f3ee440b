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

}  // namespace sparvar::cli
