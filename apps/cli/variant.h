// Ways to draw, as flags name them: a plan, and what else is left out.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "pipeline/evaluate.h"

namespace sparvar::cli {

/// "PLAN[+skipN][+uncondN]" taken apart: a preset or a JSON file, scales to skip, the scale where guidance ends. PLAN
/// may be "fastvar=OTHER": tokens are pruned until as many query-key pairs are computed as by plan OTHER.
struct VariantSource {
  std::string name;  // as it was written
  std::string plan;
  std::string as_many_pairs_as{};  // OTHER; `plan` is fastvar then
  int skip_scales = 0;
  int uncond_until = -1;
};

/// Throws CLI::ValidationError naming the flag.
VariantSource parse_variant(const std::string& flag, const std::string& text);
/// Reads the plan. Throws as AttentionPlan does.
Variant load_variant(const VariantSource& source, int layers, int scales);
/// The plan whose pairs a variant is fitted to.
AttentionPlan fitted_to(const VariantSource& source, int layers, int scales);
/// The variant with the share of tokens that makes its pairs those of `other`, a picture drawn with fitted_to(source).
void fit_pairs(Variant& variant, const GenerateResult& other);

}  // namespace sparvar::cli
