// sparvar tune: the cheapest plan that holds a PSNR against dense attention.
#include "pipeline/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "flags.h"
#include "image/atomic_file.h"
#include "interrupt.h"
#include "output_file.h"
#include "pipeline/evaluate.h"
#include "progress.h"
#include "prompts.h"
#include "report.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int shown_plans = 20;

struct Settings {
  std::string prompts, held_out;
  std::string output;
  double target = 30;
  double budget = 600;
  std::uint64_t search_seed = 0;
  GenerateOptions generate;
  PipelineOptions pipeline;
  bool json = false;
  bool quiet = false;
};

/// Prompts to search on, then those to judge by. Without a file of their own, every other prompt is held out.
struct Split {
  std::vector<std::string> prompts;
  int tuning = 0;
};

Split split_prompts(const Settings& settings) {
  const std::vector<std::string> given = read_prompts(settings.prompts);
  Split split;
  if (!settings.held_out.empty()) {
    split.prompts = given;
    split.tuning = static_cast<int>(given.size());
    const std::vector<std::string> held_out = read_prompts(settings.held_out);
    for (const std::string& prompt : held_out)
      if (std::find(given.begin(), given.end(), prompt) != given.end())
        throw Error(ErrorKind::usage, fmt::format("{}: '{}' is in {} too; a plan must not be judged by what it was "
                                                  "chosen on",
                                                  settings.held_out, prompt, settings.prompts));
    split.prompts.insert(split.prompts.end(), held_out.begin(), held_out.end());
    return split;
  }
  if (given.size() < 2)
    throw Error(ErrorKind::usage,
                fmt::format("{}: one prompt; tuning needs two or more, or others with --held-out", settings.prompts));
  for (std::size_t i = 0; i < given.size(); i += 2) split.prompts.push_back(given[i]);
  split.tuning = static_cast<int>(split.prompts.size());
  for (std::size_t i = 1; i < given.size(); i += 2) split.prompts.push_back(given[i]);
  return split;
}

/// Draws pictures beside dense ones, which are drawn once and kept.
class Judge {
 public:
  Judge(Pipeline& pipeline, const GenerateOptions& generate, int cases)
      : pipeline_(pipeline), generate_(generate), dense_(static_cast<std::size_t>(cases)) {
    first_scale_ = first_tuned_scale(static_cast<int>(pipeline.info().schedule.size()));
    (void)draw(pipeline_, options_of_case(generate_, 0), dense_plan_);  // warms up
  }

  Trial operator()(const AttentionPlan& plan, int index) {
    std::optional<Drawn>& dense = dense_[static_cast<std::size_t>(index)];
    if (!dense) dense = draw(pipeline_, options_of_case(generate_, index), dense_plan_);
    if (plan.rules.empty()) return trial_of(dense->result, kEqualPsnr);
    Drawn drawn = draw(pipeline_, options_of_case(generate_, index), plan);
    return trial_of(drawn.result, std::min(psnr(dense->image, drawn.image), kEqualPsnr));
  }

 private:
  Trial trial_of(const GenerateResult& result, double psnr) const {
    Trial trial{.psnr = psnr};
    double keys = 0;
    for (int k = 0; k < static_cast<int>(result.scales.size()); ++k) {
      const ScaleTiming& scale = result.scales[static_cast<std::size_t>(k)];
      keys += scale.grid.tokens();
      if (k < first_scale_) continue;
      trial.seconds += scale.attention_seconds;
      trial.pairs += scale.share_of_pairs * keys * scale.grid.tokens();
    }
    return trial;
  }

  Pipeline& pipeline_;
  const GenerateOptions& generate_;
  const AttentionPlan dense_plan_{"dense", {}};
  std::vector<std::optional<Drawn>> dense_;
  int first_scale_ = 0;
};

double share_of(const Tried& tried, const Tried& dense) {
  const auto& trials = tried.tuning.empty() ? tried.held_out : tried.tuning;
  const auto& all = dense.tuning;
  return trials.empty() || all.empty() ? NAN : trials.front().pairs / all.front().pairs;
}

const Tried& dense_of(const TuneResult& result) {
  return *std::find_if(result.tried.begin(), result.tried.end(), [](const Tried& tried) {
    return std::all_of(tried.layers.begin(), tried.layers.end(), [](int option) { return option == 0; });
  });
}

std::string text_report(const Settings& settings, const TuneResult& result, const AttentionPlan& plan, int scales) {
  std::string out =
      fmt::format("{} plans tried; the frontier, of {} held-out pictures{}\n", result.tried.size(),
                  result.held_out_cases, result.out_of_time ? " (the search was cut short by --budget)" : "");
  out += "\n    cost     pairs   held out    tuning  plan\n";
  const auto decibels = [](double psnr) {
    return std::isnan(psnr) ? std::string("-") : fmt::format("{:.2f} dB", psnr);
  };
  int shown = 0;
  for (std::size_t i = 0; i < result.tried.size() && shown < shown_plans; ++i) {
    const Tried& tried = result.tried[i];
    const bool chosen = static_cast<int>(i) == result.chosen;
    if (!chosen && tried.held_out.empty()) continue;
    out +=
        fmt::format("{} {:5.1f} %  {:5.1f} %  {:>9}  {:>9}  {}{}\n",
                    chosen              ? ">"
                    : tried.on_frontier ? "*"
                                        : " ",
                    100 * tried.cost / result.dense_cost, 100 * share_of(tried, dense_of(result)),
                    decibels(tried.held_out_psnr()), decibels(tried.psnr(tried.tuning.size())), tried.name,
                    static_cast<int>(tried.held_out.size()) < result.held_out_cases ? " (not judged to the end)" : "");
    ++shown;
  }
  out += fmt::format(
      "\ncost, pairs: of attention from scale {} on, against dense; > the plan that was chosen, * on the "
      "frontier\n",
      first_tuned_scale(scales));
  if (plan.rules.empty())
    out += fmt::format("No sparse plan that was tried holds {:g} dB; dense attention does.\n", settings.target);
  return out + settings.output + "\n";
}

Json tried_json(const TuneResult& result, const Tried& tried) {
  const auto number = [](double value) { return std::isfinite(value) ? Json(value) : Json(); };
  Json options = Json::array();
  for (const int option : tried.layers) options.push_back(result.options[static_cast<std::size_t>(option)].name);
  return {{"name", tried.name},
          {"layers", options},
          {"cost", number(tried.cost / result.dense_cost)},
          {"share_of_pairs", number(share_of(tried, dense_of(result)))},
          {"tuning_pictures", tried.tuning.size()},
          {"tuning_psnr", number(tried.psnr(tried.tuning.size()))},
          {"held_out_pictures", tried.held_out.size()},
          {"held_out_psnr", number(tried.held_out_psnr())},
          {"on_frontier", tried.on_frontier}};
}

Json json_report(const Settings& settings, const Split& split, const TuneResult& result, const AttentionPlan& plan,
                 const ModelInfo& model) {
  Json tried = Json::array();
  for (const Tried& one : result.tried) tried.push_back(tried_json(result, one));
  return {{"plan_file", settings.output},
          {"plan", Json::parse(plan.to_json())},
          {"target_psnr", settings.target},
          {"chosen", tried_json(result, result.tried[static_cast<std::size_t>(result.chosen)])},
          {"tuning_prompts", std::vector<std::string>(split.prompts.begin(), split.prompts.begin() + split.tuning)},
          {"held_out_prompts", std::vector<std::string>(split.prompts.begin() + split.tuning, split.prompts.end())},
          {"held_out_pictures", result.held_out_cases},
          {"cut_short", result.out_of_time},
          {"tried", tried},
          {"model", to_json(model)},
          {"machine", machine_json(model)}};
}

void run(Settings& settings) {
  if (settings.prompts.empty())
    throw Error(ErrorKind::usage, "tune: --prompts is missing; it names a file with one prompt a line");
  if (settings.output.empty()) throw Error(ErrorKind::usage, "tune: -o is missing; it names the plan that is written");
  check_output_file("-o", settings.output, ".json", {settings.prompts, settings.held_out});
  const Split split = split_prompts(settings);
  settings.generate.prompts = split.prompts;
  settings.generate.cancel = catch_interrupts();
  if (settings.pipeline.device == "auto") settings.pipeline.device = "cpu";  // sparse attention runs there
  std::unique_ptr<Pipeline> pipeline;
  {
    ProgressDisplay loading(settings.quiet);
    settings.pipeline.on_progress = [&loading](const Progress& progress) { loading.show(progress); };
    pipeline = std::make_unique<Pipeline>(Pipeline::load(settings.pipeline));
  }
  stop_if_interrupted();
  const ModelInfo& model = pipeline->info();
  const auto start = Clock::now();
  const int each = settings.generate.pictures_per_prompt;
  Judge judge(*pipeline, settings.generate, static_cast<int>(split.prompts.size()) * each);
  StepDisplay display(settings.quiet);
  TuneProblem problem;
  problem.layers = model.layers;
  problem.scales = static_cast<int>(model.schedule.size());
  problem.target = settings.target;
  problem.tuning_cases = split.tuning * each;
  problem.held_out_cases = (static_cast<int>(split.prompts.size()) - split.tuning) * each;
  problem.budget = settings.budget;
  problem.seed = settings.search_seed;
  problem.measure = [&](const AttentionPlan& plan, int index) { return judge(plan, index); };
  problem.elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  problem.on_progress = [&](const std::string& stage, double share) {
    display.show(static_cast<int>(share * settings.budget), static_cast<int>(settings.budget), stage);
  };
  const TuneResult result = tune(problem);
  display.clear();
  const AttentionPlan plan =
      result.plan(result.tried[static_cast<std::size_t>(result.chosen)], fmt::format("tuned-{:g}dB", settings.target));
  const std::string text = plan.to_json() + "\n";
  write_file_atomically(settings.output, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  if (settings.json)
    print(dump(json_report(settings, split, result, plan, model)));
  else if (!settings.quiet)
    print(text_report(settings, result, plan, problem.scales));
}

}  // namespace

void add_tune(CLI::App& program, Action& chosen) {
  CLI::App* command =
      program.add_subcommand("tune", "Finds the cheapest attention plan that keeps pictures near dense attention's");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  GenerateOptions& generate = settings->generate;
  command->add_option("--prompts", settings->prompts, "File of prompts, one a line: what the search draws")
      ->type_name("FILE");
  command
      ->add_option("--held-out", settings->held_out,
                   "File of prompts that judge what was found (every other line of --prompts)")
      ->type_name("FILE");
  add_number(*command, "--target-psnr", settings->target, Range<double>{1, 100},
             "Mean PSNR against dense attention, in dB, that held-out pictures keep (30)");
  add_number(*command, "--budget", settings->budget, Range<double>{1, 1e7},
             "Seconds the search may take; the longer, the more plans are tried (600)");
  command->add_option("-o,--output", settings->output, "The plan, for generate --plan")->type_name("FILE.json");
  add_number(*command, "-n", generate.pictures_per_prompt, Range<int>{1, 1024}, "Pictures for each prompt (1)");
  add_seed(*command, generate.seed, "Seed of all pictures (0)");
  add_number(*command, "--search-seed", settings->search_seed,
             Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max()},
             "Seed of the plans that are tried (0)");
  add_guidance(*command, generate);
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_engine(*command, settings->pipeline);
  command->add_flag("--json", settings->json, "One JSON object on standard output: all that was tried");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
