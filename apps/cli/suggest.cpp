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

namespace {

/// The command that was given, and its name as typed: "bench model".
struct Place {
  const CLI::App* command;
  std::string name;
  bool has_commands() const { return !command_names(*command).empty(); }
};

Place place_of(const CLI::App& program) {
  Place place{&program, ""};
  for (std::vector<CLI::App*> next = program.get_subcommands(); !next.empty();
       next = place.command->get_subcommands()) {
    place.command = next.front();
    place.name += (place.name.empty() ? "" : " ") + place.command->get_name();
  }
  return place;
}

/// What no command on the way understood, the innermost first.
std::vector<std::string> unknown_words(const CLI::App& program) {
  std::vector<std::string> words;
  if (const std::vector<CLI::App*> next = program.get_subcommands(); !next.empty())
    words = unknown_words(*next.front());
  if (words.empty()) words = program.remaining();
  words.erase(std::remove(words.begin(), words.end(), "--"), words.end());  // ends the options, is none
  return words;
}

}  // namespace

void refuse_unknown(const CLI::App& program) {
  const Place place = place_of(program);
  const std::string where = place.name.empty() ? "" : place.name + ": ";
  if (const std::vector<std::string> unknown = unknown_words(program); !unknown.empty()) {
    const std::string word = unknown.front().substr(0, unknown.front().find('='));
    const bool flag = word.starts_with('-');
    if (place.has_commands() && !flag) {
      throw Error(ErrorKind::usage, fmt::format("{}there is no command '{}'{}", where, word,
                                                did_you_mean(word, command_names(*place.command))));
    }
    throw Error(ErrorKind::usage, fmt::format("{}unknown {} {}{}", where, flag ? "option" : "argument", word,
                                              did_you_mean(word, flag_names(*place.command))));
  }
  if (place.has_commands()) {
    throw Error(ErrorKind::usage,
                fmt::format("{}give a command: {}; sparvar {}{}--help says more", where,
                            fmt::join(command_names(*place.command), ", "), place.name, place.name.empty() ? "" : " "));
  }
}

}  // namespace sparvar::cli
