#include "declarations.h"

namespace sparvar::cli {
namespace {

void collect(const CLI::App& command, const std::string& path, std::vector<Declared>& out) {
  out.push_back({path, &command});
  for (const CLI::App* sub : command.get_subcommands([](const CLI::App*) { return true; }))
    collect(*sub, path + (path.empty() ? "" : " ") + sub->get_name(), out);
}

}  // namespace

std::vector<Declared> all_commands(const CLI::App& program) {
  std::vector<Declared> out;
  collect(program, "", out);
  return out;
}

std::vector<const CLI::Option*> named_options(const CLI::App& command) {
  return command.get_options(
      [&](const CLI::Option* option) { return option->nonpositional() && option != command.get_help_ptr(); });
}

std::vector<const CLI::Option*> positionals(const CLI::App& command) {
  return command.get_options([](const CLI::Option* option) { return option->get_positional(); });
}

std::vector<std::string> names_of(const CLI::Option& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.get_snames()) names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) names.push_back("--" + name);
  return names;
}

bool takes_value(const CLI::Option& option) { return option.get_items_expected_max() > 0; }

}  // namespace sparvar::cli
