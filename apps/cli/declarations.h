// What the CLI11 declarations say of commands and options, for the completion script and the reference.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace sparvar::cli {

struct Declared {
  std::string path;  // "bench model"; empty: the program
  const CLI::App* command;
};

/// The program and all of its commands, outermost first, in the order of their declaration.
std::vector<Declared> all_commands(const CLI::App& program);
/// Options with a name, without --help.
std::vector<const CLI::Option*> named_options(const CLI::App& command);
std::vector<const CLI::Option*> positionals(const CLI::App& command);
/// "-o", "--output"
std::vector<std::string> names_of(const CLI::Option& option);
bool takes_value(const CLI::Option& option);

}  // namespace sparvar::cli
