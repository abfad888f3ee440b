#include "suggest.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/nearest_name.h"
#include "sparvar/error.h"

namespace sparvar::cli {
namespace {

std::vector<std::string> flag_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::vector<std::string> command_names(const CLI::App& program) {
  std::vector<std::string> names;
  for (const CLI::App* command : program.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& names) {
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(2, word.size() / 3) + 1;
  if (word.size() > 100) return best;  // not a slip of the finger
  for (const std::string& name : names) {
    const std::size_t distance = edit_distance(word, name);
    if (distance < best_distance) {
      best_distance = distance;
      best = name;
    }
  }
  return best;
}

std::string did_you_mean(const std::string& word, const std::vector<std::string>& names) {
  const std::string name = nearest(word, names);
  return name.empty() ? "" : fmt::format("; did you mean {}?", name);
}

void refuse_unknown(const CLI::App& program) {
  const std::vector<CLI::App*> commands = program.get_subcommands();
  const CLI::App& place = commands.empty() ? program : *commands.front();
  std::vector<std::string> unknown = place.remaining();
  if (unknown.empty()) unknown = program.remaining();
  unknown.erase(std::remove(unknown.begin(), unknown.end(), "--"), unknown.end());  // ends the options, is none
  if (!unknown.empty()) {
    const std::string word = unknown.front().substr(0, unknown.front().find('='));
    const bool flag = word.starts_with('-');
    if (commands.empty() && !flag) {
      throw Error(ErrorKind::usage,
                  fmt::format("there is no command '{}'{}", word, did_you_mean(word, command_names(program))));
    }
    throw Error(ErrorKind::usage,
                fmt::format("{}unknown {} {}{}", commands.empty() ? "" : place.get_name() + ": ",
                            flag ? "option" : "argument", word, did_you_mean(word, flag_names(place))));
  }
  if (commands.empty()) {
    throw Error(ErrorKind::usage, fmt::format("give a command: {}; sparvar --help lists them",
                                              fmt::join(command_names(program), " or ")));
  }
}

}  // namespace sparvar::cli
