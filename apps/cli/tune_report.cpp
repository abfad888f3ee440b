#include "tune_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "machine.h"
#include "pipeline/median.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

const Tried& plan_at(const TuneResult& result, int index) { return result.tried[static_cast<std::size_t>(index)]; }

/// Held-out pictures where there are any: they were drawn after the search, warm.
const std::vector<Trial>& trials_of(const Tried& plan) { return plan.held_out.empty() ? plan.tuning : plan.held_out; }

double share_of(const Tried& plan) {
  double sum = 0;
  for (const Trial& trial : trials_of(plan)) sum += trial.share;
  return sum / static_cast<double>(trials_of(plan).size());
}

/// Of dense attention's. Nothing was counted where the time was out before the first picture: dense alone is left then.
double cost_of(const TuneResult& result, const Tried& plan) {
  return result.dense_cost > 0 ? plan.cost / result.dense_cost : 1.0;
}

/// Median over pictures; NaN where no time is known.
double speed_up_of(const Tried& plan) {
  std::vector<double> known;
  for (const Trial& trial : trials_of(plan))
    if (trial.speed_up > 0) known.push_back(trial.speed_up);
  return known.empty() ? NAN : median(known);
}

std::string fixed(double value, int decimals) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, decimals) : std::string("-");
}

/// A line a plan: a mark, then figures, then its name.
std::vector<std::string> frontier_lines(const TuneResult& result) {
  std::vector<std::string> lines = {"   cost    pairs  speed-up      mean     worst    tuning  plan"};
  for (const int index : result.judged) {
    const Tried& plan = plan_at(result, index);
    lines.push_back(fmt::format("{} {:5.1f} % {:5.1f} % {:>8}x {:>9} {:>9} {:>9}  {}",
                                index == result.chosen ? ">"
                                : plan.on_frontier     ? "*"
                                                       : " ",
                                100 * cost_of(result, plan), 100 * share_of(plan), fixed(speed_up_of(plan), 2),
                                fixed(plan.held_out_psnr(), 2), fixed(plan.held_out_worst(), 2),
                                fixed(plan.psnr(plan.tuning.size()), 2), plan.name));
  }
  return lines;
}

std::string legend(const Tuning& tuning) {
  const int scales = static_cast<int>(tuning.model.schedule.size());
  return fmt::format(
      "cost: {} of attention from scale {} on, of dense attention's; pairs: query-key pairs computed at the last three "
      "scales; speed-up: whole pictures; PSNR in dB against dense pictures, mean and worst of {} held-out ones, mean "
      "of "
      "those searched on; > chosen, * nothing that was held out is cheaper and better",
      tuning.cost == TuneCost::pairs ? "query-key pairs" : "seconds", first_tuned_scale(scales),
      tuning.result.held_out_cases);
}

Json tried_json(const TuneResult& result, const Tried& plan) {
  const auto number = [](double value) { return std::isfinite(value) ? Json(value) : Json(); };
  Json options = Json::array();
  for (const int option : plan.layers) options.push_back(result.options[static_cast<std::size_t>(option)].name);
  return {{"name", plan.name},
          {"layers", options},
          {"cost", number(cost_of(result, plan))},
          {"share_of_pairs_last_scales", trials_of(plan).empty() ? Json() : number(share_of(plan))},
          {"speed_up", number(speed_up_of(plan))},
          {"tuning_pictures", plan.tuning.size()},
          {"tuning_psnr", number(plan.psnr(plan.tuning.size()))},
          {"held_out_pictures", plan.held_out.size()},
          {"held_out_psnr", number(plan.held_out_psnr())},
          {"held_out_worst_psnr", number(plan.held_out_worst())},
          {"judged", plan.judged},
          {"on_frontier", plan.on_frontier}};
}

}  // namespace

AttentionPlan chosen_plan(const Tuning& tuning) {
  AttentionPlan plan =
      tuning.result.plan(plan_at(tuning.result, tuning.result.chosen), fmt::format("tuned-{:g}dB", tuning.target));
  plan.note = {fmt::format("sparvar tune {} ({}): the cheapest plan found that holds {:g} dB; {}", SPARVAR_VERSION,
                           commit(), tuning.target, tuning.searched),
               fmt::format("model {} ({}); {}; {}",
                           std::filesystem::path(tuning.model.model_dir).lexically_normal().filename().string(),
                           tuning.model.model_hash, tuning.model.backend, this_machine().processor),
               legend(tuning)};
  for (const std::string& line : frontier_lines(tuning.result)) plan.note.push_back(line);
  return plan;
}

std::string text_report(const Tuning& tuning) {
  const TuneResult& result = tuning.result;
  std::string out = fmt::format(
      "{} plans tried; the frontier, of {} held-out pictures{}\n\n", result.tried.size(), result.held_out_cases,
      result.out_of_time ? " (the budget was too small to compare all plans it began with)" : "");
  for (const std::string& line : frontier_lines(result)) out += line + "\n";
  out += fmt::format("\n{}\n", legend(tuning));
  if (chosen_plan(tuning).rules.empty())
    out += fmt::format("No sparse plan that was tried holds {:g} dB; dense attention does.\n", tuning.target);
  return out + tuning.output + "\n";
}

void add_to_json(Json& out, const Tuning& tuning) {
  const TuneResult& result = tuning.result;
  out["chosen"] = tried_json(result, plan_at(result, result.chosen));
  Json frontier = Json::array(), tried = Json::array();
  for (const int index : result.judged) {
    Json plan = tried_json(result, plan_at(result, index));
    plan["chosen"] = index == result.chosen;
    plan["plan"] = Json::parse(result.plan(plan_at(result, index), plan_at(result, index).name).to_json());
    frontier.push_back(std::move(plan));
  }
  for (const Tried& plan : result.tried) tried.push_back(tried_json(result, plan));
  out["frontier"] = std::move(frontier);
  out["tried"] = std::move(tried);
}

}  // namespace sparvar::cli
