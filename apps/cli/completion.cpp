// sparvar completion: a script that completes commands, options and their values in a shell.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "commands.h"
#include "console.h"
#include "declarations.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

/// What may stand after an option.
struct Values {
  std::vector<std::string> words;
  bool files = false, folders = false;
  bool list = false;  // a comma list
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

Values values_of(const CLI::Option& option, const std::string& type) {
  Values values;
  const std::vector<std::string> names = names_of(option);
  const auto is = [&](const char* name) { return std::find(names.begin(), names.end(), name) != names.end(); };
  values.list = type.find(',') != std::string::npos;
  if (is("--attention") || is("--plans")) values.words = AttentionPlan::preset_names();
  if (is("--device")) values.words = {"auto", "cpu", "cuda"};
  if (is("--geometry")) values.words = geometry_names();
  if (values.words.empty() && type.find('|') != std::string::npos)
    values.words = split(type.substr(0, type.find('[')), '|');
  values.files = type.starts_with("FILE") || type.starts_with("PATH") || type.starts_with("PICTURE") ||
                 type.starts_with("PLAN") || is("--geometry");
  values.folders = type == "DIR";
  return values;
}

/// Bash that fills COMPREPLY.
std::string reply(const Values& values) {
  std::string out;
  if (!values.words.empty())
    out += fmt::format("{} '{}'; ", values.list ? "_sparvar_list" : "_sparvar_words", fmt::join(values.words, " "));
  if (values.files) out += "_sparvar_files -f; ";
  if (values.folders) out += "_sparvar_files -d; ";
  return out + "return";
}

constexpr const char* bash_head = R"(# Completion of sparvar {version} for bash, made by `sparvar completion bash`.
# Here and now: source <(sparvar completion bash)
# For good: sparvar completion bash > ~/.local/share/bash-completion/completions/sparvar
_sparvar_words() {{
  mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -W "$1" -- "$cur")
}}
_sparvar_list() {{
  local before="${{cur%"${{cur##*,}}"}}"
  mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -P "$before" -W "$1" -- "${{cur##*,}}")
}}
_sparvar_files() {{
  compopt -o filenames 2>/dev/null
  mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen "$1" -- "$cur")
}}
_sparvar() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD - 1]}}" command="" word
  if [ "$cur" = "=" ]; then
    cur=""
  elif [ "$prev" = "=" ]; then
    prev="${{COMP_WORDS[COMP_CWORD - 2]}}"
  fi
  COMPREPLY=()
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{command:+$command }}$word" in
      {paths}) command="${{command:+$command }}$word" ;;
    esac
  done
)";

std::string bash_script(const CLI::App& program) {
  std::vector<std::string> paths;
  std::string values, options, places;
  for (const Declared& at : all_commands(program)) {
    if (!at.path.empty()) paths.push_back("'" + at.path + "'");
    std::vector<std::string> words = {"--help"};
    for (const CLI::App* sub : at.command->get_subcommands([](const CLI::App*) { return true; }))
      words.push_back(sub->get_name());
    for (const CLI::Option* option : named_options(*at.command)) {
      const std::vector<std::string> names = names_of(*option);
      words.insert(words.end(), names.begin(), names.end());
      if (!takes_value(*option)) continue;
      std::vector<std::string> patterns;
      patterns.reserve(names.size());
      for (const std::string& name : names) patterns.push_back(fmt::format("'{}:{}'", at.path, name));
      values +=
          fmt::format("    {}) {} ;;\n", fmt::join(patterns, "|"), reply(values_of(*option, option->get_type_name())));
    }
    options += fmt::format("    '{}') _sparvar_words '{}' ;;\n", at.path, fmt::join(words, " "));
    for (const CLI::Option* positional : positionals(*at.command)) {
      const Values here = values_of(*positional, positional->get_option_text().empty() ? positional->get_type_name()
                                                                                       : positional->get_option_text());
      if (here.files || !here.words.empty()) places += fmt::format("    '{}') {} ;;\n", at.path, reply(here));
    }
  }
  std::string out = fmt::format(bash_head, fmt::arg("version", SPARVAR_VERSION),
                                fmt::arg("paths", fmt::format("{}", fmt::join(paths, "|"))));
  out += "  case \"$command:$prev\" in\n" + values + "  esac\n";
  if (!places.empty()) out += "  [[ $cur == -* ]] || case \"$command\" in\n" + places + "  esac\n";
  out += "  case \"$command\" in\n" + options + "  esac\n}\ncomplete -F _sparvar sparvar\n";
  return out;
}

}  // namespace

void add_completion(CLI::App& program, Action& chosen) {
  CLI::App* command =
      program.add_subcommand("completion", "Prints a script that completes this program's command line");
  command->allow_extras();
  const auto shell = std::make_shared<std::string>();
  command->add_option("shell", *shell, "The shell: bash")->option_text("bash");
  command->callback([shell, &program, &chosen] {
    chosen = [shell, &program] {
      if (*shell != "bash")
        throw Error(ErrorKind::usage,
                    shell->empty() ? "completion: name the shell: sparvar completion bash"
                                   : fmt::format("completion: there is no script for '{}', only for bash", *shell));
      print(bash_script(program));
    };
  });
}

}  // namespace sparvar::cli
