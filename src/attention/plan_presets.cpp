// The named plans.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

#include "attention/csla.h"
#include "attention/plan_text.h"
#include "core/nearest_name.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

Cs4aAttention cs4a_tiles(int decision_scale) {
  Cs4aAttention cs4a;
  cs4a.decision_scale = decision_scale;
  cs4a.granularity = 1;
  cs4a.group = {8, 8, 0};
  cs4a.own_windows = {7, 7};
  return cs4a;
}

Cs4aAttention cs4a_rows(int decision_scale) {
  Cs4aAttention cs4a;
  cs4a.decision_scale = decision_scale;
  return cs4a;
}

/// The published ablation, with tiles: nothing is added for the keys that are left out.
Cs4aAttention cs4a_without_cache(int decision_scale) {
  Cs4aAttention cs4a = cs4a_tiles(decision_scale);
  cs4a.residual = false;
  return cs4a;
}

constexpr std::string_view kKeepPrefix = "fastvar:";

/// R of "fastvar:R"; no value where the name is another.
std::optional<double> share_to_keep(const std::string& name) {
  if (!name.starts_with(kKeepPrefix)) return std::nullopt;
  double share = 0;
  const char* end = name.data() + name.size();
  const auto [stop, status] = std::from_chars(name.data() + kKeepPrefix.size(), end, share);
  if (status != std::errc{} || stop != end || !(share > 0 && share <= 1))
    throw Error(ErrorKind::usage, fmt::format("attention plan '{}': behind the colon stands the share of tokens that "
                                              "run, more than 0 and at most 1, as in fastvar:0.4",
                                              printable(name)));
  return share;
}

/// The best found on the bundled model at about the published cost (docs/attention-plans.md).
ProbeAttention best_probe() {
  ProbeAttention probe;
  probe.share = 0.05;
  probe.window = 9;
  probe.sink_scales = 5;
  return probe;
}

}  // namespace

std::vector<std::string> AttentionPlan::preset_names() {
  return {"dense",        "csla",  "csla-blocks", "cs4a",    "cs4a-rows",
          "cs4a-nocache", "probe", "published",   "sparvar", "fastvar"};
}

AttentionPlan AttentionPlan::preset(const std::string& name, int layers, int scales) {
  const std::vector<std::string> names = preset_names();
  const std::optional<double> keep = share_to_keep(name);
  if (!keep && std::find(names.begin(), names.end(), name) == names.end())
    throw Error(ErrorKind::usage, fmt::format("no attention plan is called '{}'; did you mean '{}'? There are: {}",
                                              printable(name), nearest_name(name, names), fmt::join(names, ", ")));
  // Below 8 scales sparsity costs more than it saves (and deciding there gives artefacts).
  const int first = std::max(scales - 3, 8);
  AttentionPlan plan{name, {}};
  if (name == "dense" || first >= scales) return plan;
  const auto everywhere = [&](const AttentionMethod& method) { plan.rules.push_back({0, -1, first, -1, method}); };
  if (name == "csla") everywhere(published_csla(scales, CslaAttention::Form::lists));
  if (name == "csla-blocks") everywhere(published_csla(scales, CslaAttention::Form::blocks));
  if (name == "cs4a") everywhere(cs4a_tiles(first));
  if (name == "cs4a-nocache") everywhere(cs4a_without_cache(first));
  if (name == "cs4a-rows") everywhere(cs4a_rows(first));
  if (name == "probe") everywhere(ProbeAttention{});
  if (name == "sparvar") everywhere(best_probe());
  if (name == "fastvar") plan.pruning = {.first_scale = first};
  if (keep) plan.pruning = {.first_scale = first, .keep = {*keep}};
  if (name == "published") {
    // Layers 0 .. 10 of Infinity-8B's 40.
    const int bound = std::max(0, static_cast<int>(std::lround(10.0 * layers / 40)));
    plan.rules.push_back({0, bound, first, -1, cs4a_rows(first)});
    plan.rules.push_back({bound + 1, -1, first, -1, published_csla(scales, CslaAttention::Form::blocks)});
  }
  return plan;
}

}  // namespace sparvar
