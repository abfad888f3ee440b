// What a search found, for people, for programs, and for whoever opens the plan later.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/tune.h"
#include "sparvar/pipeline.h"

namespace sparvar::cli {

/// A search and what it was asked.
struct Tuning {
  const TuneResult& result;
  const ModelInfo& model;
  double target = 30;
  TuneCost cost = TuneCost::seconds;
  std::string searched;  // "20 pictures of a.txt, seed 0, search seed 0, bf16"
  std::string output;    // the plan file
};

/// The chosen plan, with the frontier in its note.
AttentionPlan chosen_plan(const Tuning& tuning);
std::string text_report(const Tuning& tuning);
/// "chosen", "frontier" (with the plans themselves) and "tried".
void add_to_json(nlohmann::ordered_json& out, const Tuning& tuning);

}  // namespace sparvar::cli
