// sparvar tune: the cheapest plan that holds a PSNR against dense attention.
#include "pipeline/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
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
#include "tune_report.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Settings {
  std::string prompts, held_out;
  std::string output;
  double target = 30;
  double budget = 600;
  int trials = 0;    // 0: the budget is time
  std::string cost;  // "seconds", "pairs"; empty: pairs where trials are counted, as the result then hangs on no clock
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

/// Draws pictures beside dense ones, which are drawn once and kept. Cases from `tuning` on are drawn warm, for their
/// times.
class Judge {
 public:
  Judge(Pipeline& pipeline, const GenerateOptions& generate, int tuning, int cases)
      : pipeline_(pipeline), generate_(generate), tuning_(tuning), dense_(static_cast<std::size_t>(cases)) {
    first_scale_ = first_tuned_scale(static_cast<int>(pipeline.info().schedule.size()));
    (void)draw(pipeline_, options_of_case(generate_, 0), dense_plan_);  // warms up
  }

  Trial operator()(const AttentionPlan& plan, int index) {
    std::optional<Drawn>& dense = dense_[static_cast<std::size_t>(index)];
    if (!dense) dense = drawn(dense_plan_, index);
    if (plan.rules.empty()) return trial_of(dense->result, dense->result, kEqualPsnr);
    const Drawn sparse = drawn(plan, index);
    return trial_of(sparse.result, dense->result, std::min(psnr(dense->image, sparse.image), kEqualPsnr));
  }
  /// Dense references are counted too.
  int pictures() const { return pictures_; }

 private:
  Drawn drawn(const AttentionPlan& plan, int index) {
    ++pictures_;
    const GenerateOptions one = options_of_case(generate_, index);
    return index < tuning_ ? draw(pipeline_, one, plan) : draw_warm(pipeline_, one, plan);
  }
  Trial trial_of(const GenerateResult& result, const GenerateResult& dense, double psnr) const {
    Trial trial{.psnr = psnr,
                .share = pairs_computed(result, dense, first_counted_scale(dense.schedule)),
                .speed_up = dense.total_seconds / result.total_seconds};
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
  int tuning_;
  int pictures_ = 0;
  const AttentionPlan dense_plan_{"dense", {}};
  std::vector<std::optional<Drawn>> dense_;
  int first_scale_ = 0;
};

std::string searched_text(const Settings& settings, const TuneResult& result) {
  return fmt::format(
      "searched on the first {} pictures of {}, judged on others of {}; seed {}, search seed {}, {} {}, {}",
      result.tuning_cases, std::filesystem::path(settings.prompts).filename().string(),
      std::filesystem::path(settings.held_out.empty() ? settings.prompts : settings.held_out).filename().string(),
      settings.generate.seed, settings.search_seed, settings.trials > 0 ? "trials" : "budget in seconds",
      settings.trials > 0 ? fmt::format("{}", settings.trials) : fmt::format("{:g}", settings.budget),
      name_of(settings.pipeline.precision));
}

Json json_report(const Settings& settings, const Split& split, const Tuning& tuning) {
  Json out = {{"plan_file", settings.output},
              {"plan", Json::parse(chosen_plan(tuning).to_json())},
              {"target_psnr", settings.target},
              {"cost", tuning.cost == TuneCost::pairs ? "pairs" : "seconds"},
              {"budget", settings.trials > 0 ? Json{{"trials", settings.trials}} : Json{{"seconds", settings.budget}}},
              {"seed", settings.generate.seed},
              {"search_seed", settings.search_seed},
              {"tuning_prompts", std::vector<std::string>(split.prompts.begin(), split.prompts.begin() + split.tuning)},
              {"held_out_prompts", std::vector<std::string>(split.prompts.begin() + split.tuning, split.prompts.end())},
              {"tuning_pictures", tuning.result.tuning_cases},
              {"held_out_pictures", tuning.result.held_out_cases},
              {"cut_short", tuning.result.out_of_time}};
  add_to_json(out, tuning);
  out["model"] = to_json(tuning.model);
  out["machine"] = machine_json(tuning.model);
  return out;
}

void run(Settings& settings) {
  if (settings.prompts.empty())
    throw Error(ErrorKind::usage, "tune: --prompts is missing; it names a file with one prompt a line");
  if (settings.output.empty()) throw Error(ErrorKind::usage, "tune: -o is missing; it names the plan that is written");
  check_output_file("-o", settings.output, ".json", {settings.prompts, settings.held_out});
  const Split split = split_prompts(settings);
  settings.generate.prompts = split.prompts;
  settings.generate.cancel = catch_interrupts();
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
  Judge judge(*pipeline, settings.generate, split.tuning * each, static_cast<int>(split.prompts.size()) * each);
  StepDisplay display(settings.quiet);
  TuneProblem problem;
  problem.layers = model.layers;
  problem.scales = static_cast<int>(model.schedule.size());
  problem.target = settings.target;
  problem.tuning_cases = split.tuning * each;
  problem.held_out_cases = (static_cast<int>(split.prompts.size()) - split.tuning) * each;
  const bool counted = settings.trials > 0;
  problem.budget = counted ? settings.trials : settings.budget;
  problem.cost = settings.cost == "pairs" || (settings.cost.empty() && counted) ? TuneCost::pairs : TuneCost::seconds;
  problem.seed = settings.search_seed;
  problem.measure = [&](const AttentionPlan& plan, int index) { return judge(plan, index); };
  problem.elapsed = [&] {
    return counted ? judge.pictures() : std::chrono::duration<double>(Clock::now() - start).count();
  };
  problem.on_progress = [&](const std::string& stage, double share) {
    display.show(static_cast<int>(std::min(share, 1.0) * problem.budget), static_cast<int>(problem.budget), stage);
  };
  const TuneResult result = tune(problem);
  display.clear();
  const bool timed = std::any_of(result.tried.begin(), result.tried.end(), [](const Tried& tried) {
    return std::any_of(tried.tuning.begin(), tried.tuning.end(), [](const Trial& trial) { return trial.seconds > 0; });
  });  // a GPU does not time attention alone
  const Tuning tuning{.result = result,
                      .model = model,
                      .target = settings.target,
                      .cost = timed ? problem.cost : TuneCost::pairs,
                      .searched = searched_text(settings, result),
                      .output = settings.output};
  const std::string text = chosen_plan(tuning).to_json() + "\n";
  write_file_atomically(settings.output, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  if (settings.json)
    print(dump(json_report(settings, split, tuning)));
  else if (!settings.quiet)
    print(text_report(tuning));
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
  CLI::Option* budget = add_number(*command, "--budget", settings->budget, Range<double>{1, 1e7},
                                   "Seconds the search may take; the longer, the more plans are tried (600)");
  add_number(*command, "--trials", settings->trials, Range<int>{1, 10000000},
             "Pictures the search may draw, instead of seconds: the same plan comes out every time")
      ->excludes(budget);
  command
      ->add_option("--cost", settings->cost,
                   "What the cheapest plan has least of: seconds or pairs, query-key pairs computed (seconds; with "
                   "--trials: pairs)")
      ->check(CLI::IsMember({"seconds", "pairs"}))
      ->type_name("NAME");
  command
      ->add_option("-o,--output", settings->output,
                   "The plan, for generate --plan; plan.json in a model's folder is its default")
      ->type_name("FILE.json");
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
