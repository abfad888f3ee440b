#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "attention/plan_text.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

bool within(int x, int first, int last) { return x >= first && (last < 0 || x <= last); }

constexpr int kMaxSide = 1024;  // of tiles and strides
constexpr int kMaxWindow = 1001;
constexpr std::size_t kMaxRules = 10000;

/// Collects nothing: throws at the first value out of its range.
class Checker {
 public:
  explicit Checker(std::string place) : place_(std::move(place)) {}
  void integer(const char* name, long value, long lowest, long highest) const {
    if (value < lowest || value > highest)
      throw Error(ErrorKind::usage,
                  fmt::format("{}: {} is {}; allowed: {} to {}", place_, name, value, lowest, highest));
  }
  void share(const char* name, double value) const {
    if (!(value > 0.0 && value <= 1.0))
      throw Error(ErrorKind::usage, fmt::format("{}: {} is {}; allowed: more than 0, at most 1", place_, name, value));
  }
  void group(const QueryGroup& group) const {
    integer("group.rows", group.rows, 0, 1 << 20);
    integer("group.tile_h", group.tile_h, 1, kMaxSide);
    integer("group.tile_w", group.tile_w, 1, kMaxSide);
  }

 private:
  std::string place_;
};

void check(const Checker&, const AttentionRule&, const DenseAttention&) {}

void check(const Checker& c, const AttentionRule&, const CslaAttention& m) {
  c.integer("sink_scales", m.sink_scales, 0, 64);
  c.integer("number of windows", static_cast<long>(m.windows.size()), 0, 64);
  for (const int window : m.windows) c.integer("windows", window, -1, kMaxWindow);
  c.integer("block", m.block, 1, 1 << 20);
  c.group(m.group);
}

void check(const Checker& c, const AttentionRule& rule, const Cs4aAttention& m) {
  c.integer("decision_scale", m.decision_scale, 0, 63);
  if (rule.first_scale != m.decision_scale)
    throw Error(ErrorKind::usage,
                fmt::format("rule of cs4a: its scales begin at {}, but must begin at decision_scale = {}",
                            rule.first_scale, m.decision_scale));
  c.share("share", m.share);
  c.integer("granularity", m.granularity, 1, 1 << 20);
  c.integer("number of own_windows", static_cast<long>(m.own_windows.size()), 0, 64);
  for (const int window : m.own_windows) c.integer("own_windows", window, 0, kMaxWindow);
  c.group(m.group);
}

void check(const Checker& c, const AttentionRule&, const ProbeAttention& m) {
  c.integer("stride", m.stride, 1, kMaxSide);
  c.share("share", m.share);
  c.integer("window", m.window, 0, kMaxWindow);
  c.integer("window_scales", m.window_scales, 0, 64);
  c.integer("sink_scales", m.sink_scales, 0, 64);
  c.group(m.group);
}

void check(const Checker& c, const TokenPruning& pruning) {
  c.integer("first_scale", pruning.first_scale, 1, 63);
  c.integer("number of keep", static_cast<long>(pruning.keep.size()), 1, 64);
  for (const double share : pruning.keep) c.share("keep", share);
}

}  // namespace

const AttentionMethod& AttentionPlan::method(int layer, int scale) const {
  static const AttentionMethod dense = DenseAttention{};
  for (const AttentionRule& rule : rules)
    if (within(layer, rule.first_layer, rule.last_layer) && within(scale, rule.first_scale, rule.last_scale))
      return rule.method;
  return dense;
}

int AttentionPlan::tokens_run(int scale, Grid grid) const {
  if (!pruning || scale < pruning->first_scale) return grid.tokens();
  const std::size_t at = std::min(static_cast<std::size_t>(scale - pruning->first_scale), pruning->keep.size() - 1);
  return std::clamp(static_cast<int>(std::lround(pruning->keep[at] * grid.tokens())), 1, grid.tokens());
}

bool AttentionPlan::is_static() const {
  return !pruning && std::all_of(rules.begin(), rules.end(), [](const AttentionRule& rule) {
    return std::holds_alternative<DenseAttention>(rule.method) || std::holds_alternative<CslaAttention>(rule.method);
  });
}

void AttentionPlan::validate() const {
  const std::string plan = fmt::format("attention plan {}", printable(name));
  if (pruning) check(Checker(plan + ", pruning"), *pruning);
  if (rules.size() > kMaxRules)
    throw Error(ErrorKind::usage, fmt::format("{}: {} rules; allowed: at most {}", plan, rules.size(), kMaxRules));
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const AttentionRule& rule = rules[i];
    const Checker checker(fmt::format("{}, rule {}", plan, i));
    checker.integer("first layer", rule.first_layer, 0, 4096);
    checker.integer("last layer", rule.last_layer, rule.last_layer < 0 ? -1 : rule.first_layer, 4096);
    checker.integer("first scale", rule.first_scale, 0, 63);
    checker.integer("last scale", rule.last_scale, rule.last_scale < 0 ? -1 : rule.first_scale, 63);
    std::visit([&](const auto& method) { check(checker, rule, method); }, rule.method);
    const bool meets = pruning && (rule.last_scale < 0 || rule.last_scale >= pruning->first_scale);
    if (meets && !std::holds_alternative<DenseAttention>(rule.method))
      throw Error(ErrorKind::usage,
                  fmt::format("{}, rule {}: sparse at scales where tokens are pruned, which run dense; let its scales "
                              "end at {}, before pruning.first_scale",
                              plan, i, pruning->first_scale - 1));
  }
}

}  // namespace sparvar
