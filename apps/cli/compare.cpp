// sparvar compare: one prompt and seed, dense and sparse, side by side.
#include "pipeline/compare.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "flags.h"
#include "interrupt.h"
#include "output_file.h"
#include "plan_source.h"
#include "progress.h"
#include "report.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t most_plans = 16;

struct Settings {
  std::vector<std::string> prompts;
  std::vector<std::string> plans = {"sparvar"};
  std::string output;
  PipelineOptions pipeline;
  CompareOptions compare;
  int gain = 4;
  bool cold = false;
  bool json = false;
  bool quiet = false;
};

double scales_seconds(const GenerateResult& result) {
  double sum = 0;
  for (const ScaleTiming& scale : result.scales) sum += scale.seconds;
  return sum;
}

std::string decibels(double psnr) { return std::isinf(psnr) ? "equal" : fmt::format("{:.2f} dB", psnr); }

std::string text_report(const Settings& settings, const ModelInfo& model, const Comparison& comparison) {
  std::vector<const Drawn*> all = {&comparison.dense};
  for (const Drawn& drawn : comparison.plans) all.push_back(&drawn);
  std::string out = settings.output.empty() ? "" : settings.output + "\n\n";
  out += "plan                  PSNR      SSIM    text  scales  decode   total\n";
  for (const Drawn* drawn : all) {
    const bool self = drawn == all.front();
    out += fmt::format("{:16} {:>9} {:>9} {:7.3f} {:7.3f} {:7.3f} {:7.3f} s\n", drawn->plan.name,
                       self ? "" : decibels(drawn->psnr), self ? "" : fmt::format("{:.4f}", drawn->ssim),
                       drawn->result.text_seconds, scales_seconds(drawn->result), drawn->result.decode_seconds,
                       drawn->result.total_seconds);
  }
  out += "\nscale   tokens";
  for (const Drawn* drawn : all) out += fmt::format("  {:>20}", drawn->plan.name);
  out += "   seconds and pairs computed\n";
  for (std::size_t k = 0; k < comparison.dense.result.scales.size(); ++k) {
    const Grid grid = comparison.dense.result.scales[k].grid;
    out += fmt::format("{:5}  {:>7}", k, fmt::format("{}x{}", grid.h, grid.w));
    for (const Drawn* drawn : all) {
      const ScaleTiming& scale = drawn->result.scales[k];
      out += fmt::format("  {:8.3f} s, {:6.2f} %", scale.seconds, 100 * scale.share_of_pairs);
    }
    out += "\n";
  }
  out += comparison.cold_seconds > 0
             ? fmt::format("\nWarm times; a dense picture drawn before them, cold, took {:.3f} s.\n",
                           comparison.cold_seconds)
             : "\nCold times: the dense picture, drawn first, also paid for the start.\n";
  out += fmt::format("{}, seed {}, {}\n", name_of(settings.pipeline.precision), settings.compare.generate.seed,
                     model.backend);
  return out;
}

Json drawn_json(const Drawn& drawn, bool self) {
  Json scales = Json::array();
  for (const ScaleTiming& scale : drawn.result.scales)
    scales.push_back({{"grid", {scale.grid.h, scale.grid.w}},
                      {"seconds", scale.seconds},
                      {"attention_seconds", scale.attention_seconds},
                      {"share_of_pairs", scale.share_of_pairs}});
  Json out = {{"plan", Json::parse(drawn.plan.to_json())},
              {"text_seconds", drawn.result.text_seconds},
              {"scales_seconds", scales_seconds(drawn.result)},
              {"decode_seconds", drawn.result.decode_seconds},
              {"total_seconds", drawn.result.total_seconds},
              {"share_of_pairs_at_sparse_scales", sparse_share(drawn.result)},
              {"scales", scales}};
  if (self) return out;
  out["equal"] = std::isinf(drawn.psnr);
  out["psnr"] = std::isinf(drawn.psnr) ? Json() : Json(drawn.psnr);
  out["ssim"] = std::isnan(drawn.ssim) ? Json() : Json(drawn.ssim);
  return out;
}

std::string json_report(const Settings& settings, const ModelInfo& model, const Comparison& comparison) {
  Json plans = Json::array();
  for (const Drawn& drawn : comparison.plans) plans.push_back(drawn_json(drawn, false));
  return dump({{"picture", settings.output.empty() ? Json() : Json(settings.output)},
               {"prompt", settings.prompts.front()},
               {"seed", settings.compare.generate.seed},
               {"dtype", name_of(settings.pipeline.precision)},
               {"weights", name_of(model.weights, settings.pipeline.precision)},
               {"gain", settings.gain},
               {"warm", comparison.cold_seconds > 0},
               {"cold_seconds", comparison.cold_seconds},
               {"dense", drawn_json(comparison.dense, true)},
               {"plans", plans},
               {"model", to_json(model)},
               {"machine", machine_json(model)}});
}

ImageMetadata metadata(const Settings& settings, const Comparison& comparison) {
  Json plans = Json::array();
  for (const Drawn& drawn : comparison.plans) {
    plans.push_back(Json::parse(drawn.plan.to_json()));
    plans.back().erase("note");
  }
  return {{"Software", "sparvar " SPARVAR_VERSION},
          {"prompt", settings.prompts.front()},
          {"seed", std::to_string(settings.compare.generate.seed)},
          {"plans", plans.dump(-1, ' ', false, Json::error_handler_t::replace)}};
}

void run(Settings& settings) {
  if (settings.prompts.size() != 1)
    throw Error(ErrorKind::usage, fmt::format("compare: one prompt is needed, {} were given{}", settings.prompts.size(),
                                              settings.prompts.empty() ? "" : " (quote a prompt of several words)"));
  if (settings.plans.size() > most_plans)
    throw Error(ErrorKind::usage,
                fmt::format("compare: {} plans; at most {} are drawn", settings.plans.size(), most_plans));
  std::vector<std::string> inputs;
  for (const std::string& name : settings.plans)
    if (names_file(name)) inputs.push_back(name);
  check_output_file("-o", settings.output, ".png", inputs);
  for (const std::string& file : inputs) (void)AttentionPlan::from_file(file);  // before a model is looked for
  CompareOptions& options = settings.compare;
  const ModelInfo outline = model_outline(settings.pipeline.model_dir);
  for (const std::string& name : settings.plans)
    options.plans.push_back(plan_of(name, outline.layers, static_cast<int>(outline.schedule.size())));
  choose_device(settings.pipeline, options.plans);
  options.warm_up = !settings.cold;
  options.generate.prompts = settings.prompts;
  options.generate.cancel = catch_interrupts();
  ProgressDisplay display(settings.quiet);
  Pipeline pipeline = Pipeline::load(settings.pipeline);
  stop_if_interrupted();
  const ModelInfo& model = pipeline.info();
  options.generate.on_progress = [&display](const Progress& progress) { display.show(progress); };
  const Comparison comparison = compare(pipeline, options);
  display.clear();
  if (!settings.output.empty()) {
    const std::string title = fmt::format("{} (seed {}, {})", settings.prompts.front(), options.generate.seed,
                                          name_of(settings.pipeline.precision));
    write_png(settings.output, comparison_sheet(comparison, title, settings.gain), metadata(settings, comparison));
  }
  if (settings.json)
    print(json_report(settings, model, comparison));
  else if (!settings.quiet)
    print(text_report(settings, model, comparison));
}

}  // namespace

void add_compare(CLI::App& program, Action& chosen) {
  CLI::App* command =
      program.add_subcommand("compare", "Draws one prompt with dense and sparse attention and shows the difference");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  GenerateOptions& generate = settings->compare.generate;
  command->add_option("prompt", settings->prompts, "What to draw")
      ->expected(CLI::detail::expected_max_vector_size, CLI::detail::expected_max_vector_size)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->option_text("PROMPT");
  command
      ->add_option_function<std::string>(
          "--plans",
          [settings](const std::string& text) {
            settings->plans = comma_list("--plans", text);
            for (const std::string& name : settings->plans)
              if (!names_file(name)) check_preset("--plans", name);
          },
          "Attention plans to compare with dense: presets and JSON files (sparvar)")
      ->type_name("PLAN[,PLAN...]");
  add_seed(*command, generate.seed, "Seed of all pictures (0)");
  add_guidance(*command, generate);
  add_number(*command, "--gain", settings->gain, Range<int>{1, 255},
             "The difference is drawn this many times larger (4)");
  command->add_flag("--cold", settings->cold, "Do not draw a dense picture first to warm up");
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_weights(*command, settings->pipeline);
  add_engine(*command, settings->pipeline);
  command->add_option("-o,--output", settings->output, "The pictures and their difference, side by side")
      ->type_name("FILE.png");
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
