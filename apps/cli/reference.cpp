// sparvar reference: docs/commands.md, made of the declarations.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "commands.h"
#include "console.h"
#include "declarations.h"

namespace sparvar::cli {
namespace {

/// In a cell of a Markdown table.
std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

std::string value_of(const CLI::Option& option) {
  if (!option.get_option_text().empty()) return option.get_option_text();
  return takes_value(option) ? option.get_type_name() : "";
}

std::string usage_of(const Declared& at) {
  std::string usage = "sparvar" + (at.path.empty() ? "" : " " + at.path);
  for (const CLI::Option* positional : positionals(*at.command)) usage += " " + value_of(*positional);
  if (!named_options(*at.command).empty()) usage += " [OPTIONS]";
  if (!at.command->get_subcommands([](const CLI::App*) { return true; }).empty()) usage += " COMMAND";
  return usage;
}

std::string section(const Declared& at) {
  std::string out = at.path.empty() ? "" : fmt::format("\n## {}\n", at.path);
  out += fmt::format("{}\n\n```sh\n{}\n```\n", at.command->get_description(), usage_of(at));
  std::string rows;
  for (const CLI::Option* option : positionals(*at.command))
    rows += fmt::format("| `{}` | {} |\n", escaped(value_of(*option)), escaped(option->get_description()));
  for (const CLI::Option* option : named_options(*at.command)) {
    const std::string value = value_of(*option);
    rows += fmt::format("| `{}{}` | {} |\n", fmt::join(names_of(*option), "`, `"),
                        value.empty() ? "" : " " + escaped(value), escaped(option->get_description()));
  }
  if (!rows.empty()) out += "\n| option | meaning (default) |\n|---|---|\n" + rows;
  std::string commands;
  for (const CLI::App* sub : at.command->get_subcommands([](const CLI::App*) { return true; }))
    commands += fmt::format("| `{}` | {} |\n", sub->get_name(), escaped(sub->get_description()));
  if (!commands.empty()) out += "\n| command | |\n|---|---|\n" + commands;
  return out;
}

std::string reference(const CLI::App& program) {
  std::string out =
      "# Commands\n"
      "Made by `sparvar reference > docs/commands.md` from the declarations in `apps/cli/`; a test checks that it is "
      "up to "
      "date.\n"
      "Every command takes `--help`. Exit codes: 0 done, 2 the command line asks for something impossible, 1 any other "
      "failure, 130 Ctrl-C.\n\n";
  for (const Declared& at : all_commands(program)) out += section(at);
  return out;
}

}  // namespace

void add_reference(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand("reference", "Prints the reference of all commands as Markdown");
  command->allow_extras();
  command->callback([&program, &chosen] { chosen = [&program] { print(reference(program)); }; });
}

}  // namespace sparvar::cli
