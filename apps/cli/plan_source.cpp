#include "plan_source.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "sparvar/error.h"
#include "suggest.h"

namespace sparvar::cli {

void add_plan_source(CLI::App& command, PlanSource& source, const std::string& otherwise) {
  auto* attention = command.add_option_function<std::string>(
      "--attention",
      [&source](const std::string& name) {
        check_preset("--attention", name);
        source.preset = name;
      },
      fmt::format("Attention plan: {} ({})", fmt::join(AttentionPlan::preset_names(), ", "), otherwise));
  attention->type_name("NAME");
  command.add_option("--plan", source.file, "Attention plan from a JSON file")->type_name("FILE")->excludes(attention);
}

AttentionPlan load_plan(const PlanSource& source, int layers, int scales) {
  if (!source.file.empty()) return AttentionPlan::from_file(source.file);
  return AttentionPlan::preset(source.preset, layers, scales);
}

std::vector<std::string> comma_list(const std::string& flag, const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    if (end == begin) throw CLI::ValidationError(flag, fmt::format("an empty name in the list '{}'", text));
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

void check_preset(const std::string& flag, const std::string& name) {
  const std::vector<std::string> names = AttentionPlan::preset_names();
  if (std::find(names.begin(), names.end(), name) != names.end()) return;
  if (name.starts_with("fastvar:")) {
    try {
      (void)AttentionPlan::preset(name, 1, 13);
    } catch (const Error& error) {
      throw CLI::ValidationError(flag, error.what());
    }
    return;
  }
  throw CLI::ValidationError(flag, fmt::format("there is no plan '{}'{} (plans: {})", name, did_you_mean(name, names),
                                               fmt::join(names, ", ")));
}

bool names_file(const std::string& name) { return name.ends_with(".json"); }

AttentionPlan plan_of(const std::string& preset_or_file, int layers, int scales) {
  return names_file(preset_or_file) ? AttentionPlan::from_file(preset_or_file)
                                    : AttentionPlan::preset(preset_or_file, layers, scales);
}

void choose_device(PipelineOptions& options, const std::vector<AttentionPlan>& plans) {
  const auto prunes =
      std::find_if(plans.begin(), plans.end(), [](const auto& plan) { return plan.pruning.has_value(); });
  if (prunes == plans.end() || options.device == "cpu") return;
  if (options.device != "auto")
    throw Error(ErrorKind::usage,
                fmt::format("plan {} prunes tokens, which runs on the CPU only; take --device cpu, or "
                            "leave the plan out",
                            prunes->name));
  options.device = "cpu";
}

}  // namespace sparvar::cli
