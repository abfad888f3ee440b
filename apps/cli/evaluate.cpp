// sparvar evaluate: plans against dense attention over many prompts, as figures and as a page.
#include <fmt/format.h>

#include <memory>
#include <set>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "evaluation_report.h"
#include "flags.h"
#include "interrupt.h"
#include "plan_source.h"
#include "progress.h"
#include "prompts.h"
#include "report.h"
#include "variant.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t most_variants = 32;
constexpr int most_pictures = 100000;

struct Settings {
  std::string prompts;
  std::vector<VariantSource> variants;
  std::string folder;
  GenerateOptions generate;
  PipelineOptions pipeline;
  int worst = 3;
  bool json = false;
  bool quiet = false;
};

/// All that figures depend on: a run with the same goes on where another stopped.
Json settings_json(const Settings& settings, const ModelInfo& model, const std::vector<Variant>& variants) {
  Json plans = Json::array();
  for (const Variant& variant : variants) {
    Json plan = Json::parse(variant.plan.to_json());
    plan.erase("note");
    plans.push_back({{"name", variant.name},
                     {"skip_scales", variant.skip_scales},
                     {"uncond_until", variant.uncond_until},
                     {"plan", std::move(plan)}});
  }
  const GenerateOptions& generate = settings.generate;
  return {{"prompts", generate.prompts},
          {"pictures_per_prompt", generate.pictures_per_prompt},
          {"seed", generate.seed},
          {"cfg", generate.cfg},
          {"tau", generate.tau},
          {"dtype", name_of(settings.pipeline.precision)},
          {"model_hash", model.model_hash},
          {"backend", model.backend},
          {"variants", plans},
          {"worst", settings.worst}};
}

void run(Settings& settings) {
  if (settings.variants.empty())
    throw Error(ErrorKind::usage, "evaluate: --plans is missing; name plans to compare with dense attention");
  if (settings.prompts.empty())
    throw Error(ErrorKind::usage, "evaluate: --prompts is missing; it names a file with one prompt a line");
  if (settings.folder.empty()) throw Error(ErrorKind::usage, "evaluate: -o is missing; it names the report's folder");
  if (settings.variants.size() > most_variants)
    throw Error(ErrorKind::usage,
                fmt::format("evaluate: {} plans; at most {} are compared", settings.variants.size(), most_variants));
  std::set<std::string> names;
  for (const VariantSource& source : settings.variants) {
    if (!names.insert(source.name).second)
      throw Error(ErrorKind::usage, fmt::format("evaluate: '{}' is in --plans twice", source.name));
    for (const std::string& plan : {source.plan, source.as_many_pairs_as})
      if (names_file(plan)) (void)AttentionPlan::from_file(plan);  // before a model is looked for
  }
  EvaluateOptions options;
  settings.generate.prompts = read_prompts(settings.prompts);
  const std::size_t pictures =
      settings.generate.prompts.size() * static_cast<std::size_t>(settings.generate.pictures_per_prompt);
  if (pictures > most_pictures)
    throw Error(ErrorKind::usage,
                fmt::format("evaluate: {} pictures of each plan; at most {} are drawn", pictures, most_pictures));
  const ModelInfo outline = model_outline(settings.pipeline.model_dir);
  const int scales = static_cast<int>(outline.schedule.size());
  std::vector<AttentionPlan> plans;
  for (const VariantSource& source : settings.variants) {
    options.variants.push_back(load_variant(source, outline.layers, scales));
    plans.push_back(options.variants.back().plan);
  }
  choose_device(settings.pipeline, plans);
  settings.generate.cancel = catch_interrupts();
  std::unique_ptr<Pipeline> pipeline;
  {
    ProgressDisplay loading(settings.quiet);
    settings.pipeline.on_progress = [&loading](const Progress& progress) { loading.show(progress); };
    pipeline = std::make_unique<Pipeline>(Pipeline::load(settings.pipeline));
  }
  stop_if_interrupted();
  const ModelInfo& model = pipeline->info();
  options.generate = settings.generate;
  for (std::size_t v = 0; v < options.variants.size(); ++v) {
    const VariantSource& source = settings.variants[v];
    if (source.as_many_pairs_as.empty()) continue;
    const Drawn other = draw(*pipeline, options_of_case(options.generate, 0), fitted_to(source, model.layers, scales));
    fit_pairs(options.variants[v], other.result);
  }
  EvaluationReport report(settings.folder, settings_json(settings, model, options.variants), options.generate,
                          options.variants, settings.worst);
  options.known = report.known();
  StepDisplay display(settings.quiet);
  options.on_progress = [&](int done, int total, const std::string& what) { display.show(done, total, what); };
  options.on_case = [&](const CaseScores& scores, const Drawn& dense, const std::vector<Drawn>& drawn) {
    report.add(scores, dense, drawn);
  };
  const std::vector<CaseScores> cases = evaluate(*pipeline, options);
  const Json json = report.finish(model);
  display.clear();
  if (settings.json)
    print(dump(json));
  else if (!settings.quiet)
    print(
        fmt::format("{0}/index.html\n{0}/report.json\n\n{1}", settings.folder, summary_table(options.variants, cases)));
}

}  // namespace

void add_evaluate(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand(
      "evaluate", "Measures plans against dense attention over many prompts: quality, time, pairs computed");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  GenerateOptions& generate = settings->generate;
  command->add_option("--prompts", settings->prompts, "File of prompts, one a line; - is standard input")
      ->type_name("FILE");
  command
      ->add_option_function<std::string>(
          "--plans",
          [settings](const std::string& text) {
            settings->variants.clear();
            for (const std::string& name : comma_list("--plans", text))
              settings->variants.push_back(parse_variant("--plans", name));
          },
          "Presets and JSON files; PLAN+skip2 leaves out the last 2 scales, PLAN+uncond10 ends guidance at scale 10; "
          "fastvar=PLAN prunes tokens until as many pairs are computed as by PLAN")
      ->type_name("PLAN[,PLAN...]");
  command
      ->add_option("-o,--output", settings->folder, "Folder of the report; a run that was stopped goes on where it was")
      ->type_name("DIR");
  add_number(*command, "-n", generate.pictures_per_prompt, Range<int>{1, 1024}, "Pictures for each prompt (1)");
  add_seed(*command, generate.seed, "Seed of all pictures (0)");
  add_guidance(*command, generate);
  add_number(*command, "--worst", settings->worst, Range<int>{0, 100}, "Worst pictures of each plan on the page (3)");
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_engine(*command, settings->pipeline);
  command->add_flag("--json", settings->json, "report.json on standard output too");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
