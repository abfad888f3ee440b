// conformance DIR...: runs golden fixtures through the engine and compares every tensor they hold.
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
  if (model == "infinity") return run_infinity(dir, config, settings, report);
  if (model == "bsq-vae") return run_vae(dir, config, settings, report);
  if (model == "t5") return run_t5(dir, config, settings, report);
  if (config.contains("decision_scale")) return run_cs4a(dir, config, report);
  if (config.contains("win_size") && config.contains("cases")) return run_csla(dir, config, report);
  if (!config.empty() && config.begin().value().is_object() && config.begin().value().contains("file"))
    return run_bundled(dir, config, settings, report);
  throw Error(
      ErrorKind::input,
      fmt::format(
          "{}: not a fixture of a kind this program knows (infinity, bsq-vae, t5, csla mask, cs4a, bundled model)",
          dir));
}

int main_checked(const std::vector<std::string>& arguments) {
  Settings settings;
  std::vector<std::string> folders;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--bf16")
      settings.bf16 = true;
    else if (arguments[i] == "--fp8")
      settings.bf16 = settings.fp8 = true;
    else if (arguments[i] == "--device" && i + 1 < arguments.size())
      settings.device = arguments[++i];
    else if (arguments[i] == "--model" && i + 1 < arguments.size())
      settings.model_dir = arguments[++i];
    else if (!arguments[i].empty() && arguments[i][0] == '-')
      throw Error(
          ErrorKind::usage,
          fmt::format("unknown option {}; usage: conformance [--bf16] [--fp8] [--device NAME] [--model DIR] DIR...",
                      arguments[i]));
    else
      folders.push_back(arguments[i]);
  }
  if (folders.empty())
    throw Error(ErrorKind::usage, "usage: conformance [--bf16] [--fp8] [--device NAME] [--model DIR] DIR...");
  if (settings.model_dir.empty()) settings.model_dir = bundled_model_dir();
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
