// Attention plans as flags name them: a preset, or a file.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

/// A preset, or a JSON file; both are empty where a command chooses one itself.
struct PlanSource {
  std::string preset;
  std::string file;
  bool named() const { return !preset.empty() || !file.empty(); }
};

/// Declares --attention and --plan, which exclude each other. `otherwise` tells what is taken where neither is given;
/// source.preset is what load_plan takes then.
void add_plan_source(CLI::App& command, PlanSource& source, const std::string& otherwise);
AttentionPlan load_plan(const PlanSource& source, int layers, int scales);

/// Parts of a comma list; throws CLI::ValidationError naming the flag where one is empty.
std::vector<std::string> comma_list(const std::string& flag, const std::string& text);
/// Throws CLI::ValidationError, with the nearest name, where there is no such preset.
void check_preset(const std::string& flag, const std::string& name);
/// Names that are files: those that end in .json.
bool names_file(const std::string& name);
AttentionPlan plan_of(const std::string& preset_or_file, int layers, int scales);

/// Turns `auto` into the CPU where one of the plans runs nowhere else, so that all of them run on one device; throws
/// Error(usage) where another device was asked for.
void choose_device(PipelineOptions& options, const std::vector<AttentionPlan>& plans);

}  // namespace sparvar::cli
