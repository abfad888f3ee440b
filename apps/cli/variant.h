// Ways to draw, as flags name them: a plan, and what else is left out.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "pipeline/evaluate.h"

namespace sparvar::cli {

/// "PLAN[+skipN][+uncondN]" taken apart: a preset or a JSON file, scales to skip, the scale where guidance ends.
struct VariantSource {
  std::string name;  // as it was written
  std::string plan;
  int skip_scales = 0;
  int uncond_until = -1;
};

/// Throws CLI::ValidationError naming the flag.
VariantSource parse_variant(const std::string& flag, const std::string& text);
/// Reads the plan. Throws as AttentionPlan does.
Variant load_variant(const VariantSource& source, int layers, int scales);

}  // namespace sparvar::cli
