// conformance DIR...: runs golden fixtures through the engine and compares every tensor they hold.
// conformance --device cuda --against cpu DIR...: the same prompts and bits on two devices, compared bit by bit.
// The kind of a folder is recognised from its files. Exit code 0: all within tolerance.
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "conformance/report.h"
#include "sparvar/error.h"
#include "sparvar/pipeline.h"

namespace sparvar::conformance {
namespace {

void run(const std::string& dir, const Settings& settings, Report& report) {
  const nlohmann::json config = read_json(dir + "/config.json");
  const std::string model = config.value("model", config.value("model_type", std::string()));
  const bool bundled = !config.empty() && config.begin().value().is_object() && config.begin().value().contains("file");
  if (!settings.against.empty() && model != "infinity" && !bundled)
    throw Error(ErrorKind::usage, fmt::format("{}: --against is for infinity and the bundled model", dir));
  if (model == "infinity") return run_infinity(dir, config, settings, report);
  if (model == "bsq-vae") return run_vae(dir, config, settings, report);
  if (model == "t5") return run_t5(dir, config, settings, report);
  if (config.contains("decision_scale")) return run_cs4a(dir, config, settings, report);
  if (config.contains("win_size") && config.contains("cases")) return run_csla(dir, config, settings, report);
  if (bundled) return run_bundled(dir, config, settings, report);
  throw Error(
      ErrorKind::input,
      fmt::format(
          "{}: not a fixture of a kind this program knows (infinity, bsq-vae, t5, csla mask, cs4a, bundled model)",
          dir));
}

constexpr const char* kUsage =
    "usage: conformance [--bf16] [--fp8] [--device NAME] [--model DIR] [--token-order HxW] DIR...\n"
    "       conformance [--bf16] [--device NAME] [--model DIR] [--token-order HxW] --against NAME [--against-bf16] "
    "[--attention PLAN] "
    "[--own-choices] [--margin X] [--scales N] DIR...";

double number(const std::string& option, const std::string& text) {
  std::size_t read = 0;
  double value = -1;
  try {
    value = std::stod(text, &read);
  } catch (const std::exception&) {
    read = 0;
  }
  if (read == 0 || read != text.size() || !(value >= 0))
    throw Error(ErrorKind::usage, fmt::format("{}: expected a number of 0 or more, found '{}'", option, text));
  return value;
}

TokenOrder order(const std::string& option, const std::string& text) {
  const std::size_t cross = text.find('x');
  if (cross == std::string::npos)
    throw Error(ErrorKind::usage, fmt::format("{}: expected HxW, found '{}'", option, text));
  return {static_cast<int>(number(option, text.substr(0, cross))),
          static_cast<int>(number(option, text.substr(cross + 1)))};
}

struct Arguments {
  Settings settings;
  std::vector<std::string> folders;
};

Arguments read_arguments(const std::vector<std::string>& words) {
  Arguments out;
  Settings& settings = out.settings;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&] {
      if (i + 1 == words.size()) throw Error(ErrorKind::usage, fmt::format("{} wants a value; {}", word, kUsage));
      return words[++i];
    };
    if (word == "--bf16")
      settings.bf16 = true;
    else if (word == "--fp8")
      settings.bf16 = settings.fp8 = true;
    else if (word == "--against-bf16")
      settings.against_bf16 = true;
    else if (word == "--own-choices")
      settings.own_choices = true;
    else if (word == "--device")
      settings.device = value();
    else if (word == "--model")
      settings.model_dir = value();
    else if (word == "--against")
      settings.against = value();
    else if (word == "--attention")
      settings.attention = value();
    else if (word == "--token-order")
      settings.order = order(word, value());
    else if (word == "--margin")
      settings.most_margin = number(word, value());
    else if (word == "--scales")
      settings.scales = static_cast<int>(number(word, value()));
    else if (!word.empty() && word[0] == '-')
      throw Error(ErrorKind::usage, fmt::format("unknown option {}; {}", word, kUsage));
    else
      out.folders.push_back(word);
  }
  if (out.folders.empty()) throw Error(ErrorKind::usage, kUsage);
  if (settings.against.empty() && (settings.against_bf16 || settings.attention != "dense" || settings.own_choices ||
                                   settings.most_margin || settings.scales > 0))
    throw Error(
        ErrorKind::usage,
        fmt::format("--against-bf16, --attention, --own-choices, --margin and --scales go with --against; {}", kUsage));
  if (settings.fp8 && settings.order != TokenOrder())
    throw Error(ErrorKind::usage, fmt::format("--token-order does not go with --fp8; {}", kUsage));
  if (settings.model_dir.empty()) settings.model_dir = bundled_model_dir();
  return out;
}

int main_checked(const std::vector<std::string>& words) {
  const auto [settings, folders] = read_arguments(words);
  int failed = 0;
  for (const std::string& folder : folders) {
    Report report(std::filesystem::path(folder).lexically_normal().filename().string());
    try {
      run(folder, settings, report);
    } catch (const std::exception& error) {
      fmt::print("{}\n", error.what());
      ++failed;
      continue;
    }
    fmt::print("{}: {} checks, {} failed\n", folder, report.checks(), report.failures());
    if (!report.passed()) ++failed;
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace sparvar::conformance

int main(int argc, char** argv) {
  try {
    return sparvar::conformance::main_checked({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "conformance: %s\n", error.what());
    return 2;
  }
}
