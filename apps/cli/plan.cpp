// sparvar plan: which keys a plan reads at a scale, drawn and counted.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "attention/csla.h"
#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "flags.h"
#include "image/atomic_file.h"
#include "interrupt.h"
#include "output_file.h"
#include "pipeline/mask_picture.h"
#include "plan_source.h"
#include "progress.h"
#include "report.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

constexpr int block_side = 128;
constexpr int usual_side = 2048;  // of a picture, in pixels

enum class Show { tokens, lists, blocks };

struct Settings {
  std::string model;
  std::string geometry;
  PlanSource source{.preset = "sparvar", .file = {}};
  int scale = -1;  // the last
  int layer = -1;  // the first that is sparse
  Show show = Show::lists;
  int tokens_per_pixel = 0;
  std::string prompt;
  std::uint64_t seed = 0;
  std::string output, plan_file;
  bool json = false;
  bool quiet = false;
};

/// What was looked at, and what was found.
struct Answer {
  AttentionPlan plan;
  ScaleSchedule schedule;
  int layers = 0;
  int scale = 0;
  int layer = 0;
  AttentionMethod method;
  StaticMask mask;
  bool from_run = false;  // the masks are those of a picture
  Survey survey;
  int tokens_per_pixel = 0;
};

Show parse_show(const std::string& name) {
  if (name == "tokens") return Show::tokens;
  if (name == "lists") return Show::lists;
  if (name == "blocks") return Show::blocks;
  throw CLI::ValidationError("--show", fmt::format("expected tokens, lists or blocks, found '{}'", name));
}

int index_of(const char* what, int given, int count, int otherwise) {
  if (given < 0) return otherwise;
  if (given < count) return given;
  throw Error(ErrorKind::usage, fmt::format("{} {}: this model's {}s are 0 to {}", what, given, what, count - 1));
}

int first_sparse_layer(const AttentionPlan& plan, int layers, int scale) {
  for (int layer = 0; layer < layers; ++layer)
    if (!std::holds_alternative<DenseAttention>(plan.method(layer, scale))) return layer;
  return 0;
}

/// "0 to 2 cs4a, 3 to 7 csla"
std::string methods_by_layer(const Answer& answer) {
  std::string out;
  for (int first = 0; first < answer.layers;) {
    const AttentionMethod& method = answer.plan.method(first, answer.scale);
    int end = first + 1;
    while (end < answer.layers && answer.plan.method(end, answer.scale) == method) ++end;
    out += fmt::format("{}{} to {} {}", out.empty() ? "" : ", ", first, end - 1, name_of(method));
    first = end;
  }
  return out;
}

/// The lists of a layer and scale as a picture makes them; the picture is not finished.
Mask lists_of_a_picture(const Settings& settings, const Answer& answer) {
  struct Seen {};
  std::optional<Mask> mask;
  PipelineOptions options;
  options.model_dir = settings.model;
  options.device = "cpu";
  Pipeline pipeline = Pipeline::load(options);
  ProgressDisplay display(settings.quiet);
  GenerateOptions generate;
  generate.prompts = {settings.prompt};
  generate.seed = settings.seed;
  generate.plan = answer.plan;
  generate.cancel = catch_interrupts();
  generate.on_progress = [&display](const Progress& progress) { display.show(progress); };
  generate.on_lists = [&](int layer, int scale, const QueryTiles& tiles, const KeyLists& lists) {
    if (layer != answer.layer || scale != answer.scale) return;
    mask = Mask{tiles, lists};
    throw Seen{};
  };
  try {
    pipeline.generate(generate);
  } catch (const Seen&) {
  }
  if (!mask)
    throw Error(ErrorKind::usage, fmt::format("layer {} is dense at scale {}: there are no lists of a picture to draw",
                                              answer.layer, answer.scale));
  return *mask;
}

Answer find(const Settings& settings) {
  const ModelConfig config =
      settings.geometry.empty()
          ? read_model_config((settings.model.empty() ? bundled_model_dir() : settings.model) + "/config.json")
          : geometry(settings.geometry);
  Answer answer;
  answer.schedule = config.schedule;
  answer.layers = config.transformer.depth;
  const int scales = static_cast<int>(config.schedule.size());
  answer.plan = load_plan(settings.source, answer.layers, scales);
  answer.scale = index_of("scale", settings.scale, scales, scales - 1);
  answer.layer =
      index_of("layer", settings.layer, answer.layers, first_sparse_layer(answer.plan, answer.layers, answer.scale));
  answer.method = answer.plan.method(answer.layer, answer.scale);
  answer.mask = static_mask(answer.method, answer.schedule, answer.scale);
  if (!settings.prompt.empty() && !dynamic_part(answer.method, answer.schedule, answer.scale).empty()) {
    const Mask seen = lists_of_a_picture(settings, answer);
    answer.mask = {seen, seen};
    answer.from_run = true;
  }
  answer.survey = survey(answer.mask, answer.schedule, answer.scale, block_side);
  answer.tokens_per_pixel = settings.tokens_per_pixel > 0
                                ? settings.tokens_per_pixel
                                : tokens_per_pixel_for(answer.schedule, answer.scale, usual_side);
  return answer;
}

Image draw(const Settings& settings, const Answer& answer) {
  const int queries = answer.schedule[answer.scale].tokens();
  const int keys = first_keys(answer.schedule, answer.scale).back();
  const Mask mask = settings.show == Show::tokens  ? answer.mask.tokens
                    : settings.show == Show::lists ? answer.mask.lists
                                                   : whole_blocks(answer.survey.blocks, queries, keys);
  return draw_mask(mask, answer.schedule, answer.scale, answer.tokens_per_pixel);
}

std::string text_report(const Settings& settings, const Answer& answer) {
  const Grid grid = answer.schedule[answer.scale];
  const Survey& s = answer.survey;
  const std::string dynamic = dynamic_part(answer.method, answer.schedule, answer.scale);
  std::string out = fmt::format("plan      {}, layer {} of {}: {}\n", answer.plan.name, answer.layer, answer.layers,
                                name_of(answer.method));
  out += fmt::format("layers    {}\n", methods_by_layer(answer));
  out += fmt::format("scale     {} of {}: {}x{}, {} queries, {} keys\n", answer.scale, answer.schedule.size(), grid.h,
                     grid.w, grid.tokens(), first_keys(answer.schedule, answer.scale).back());
  if (!dynamic.empty())
    out += fmt::format("depends   {}\ncounted   {}\n", dynamic,
                       answer.from_run ? "the lists of a picture of the prompt, all heads and guidance halves"
                                       : "what is static alone; --prompt TEXT counts and draws a picture's lists");
  if (const int run = answer.plan.tokens_run(answer.scale, grid); run < grid.tokens())
    out += fmt::format(
        "pruned    {} of {} tokens run, dense, and read the keys of those that ran before; which ones "
        "depends on the picture: what follows counts all\n",
        run, grid.tokens());
  out += "\nby                  least      mean      most   sparsity\n";
  const auto row = [&](const char* name, const KeyCount& count, double sparsity) {
    out += fmt::format("{:14} {:>10} {:>9.1f} {:>9}   {:7.2f} %\n", name, count.least, count.mean, count.most,
                       100 * sparsity);
  };
  row("token", s.tokens, s.token_sparsity);
  row("list", s.lists, s.list_sparsity);
  out += fmt::format("block {0}x{0}  {1} of {2} computed               {3:7.2f} %\n", s.blocks.side, s.blocks.count(),
                     s.blocks.rows * s.blocks.columns, 100 * s.blocks.sparsity());
  out += "\nleast, mean, most: keys a query reads. token: what the method shows it; list: what its tile computes.\n";
  if (!settings.output.empty())
    out += fmt::format("{}: {} token{} a pixel\n", settings.output, answer.tokens_per_pixel,
                       answer.tokens_per_pixel == 1 ? "" : "s");
  if (!settings.plan_file.empty()) out += fmt::format("{}: the plan\n", settings.plan_file);
  return out;
}

std::string json_report(const Settings& settings, const Answer& answer) {
  using Json = nlohmann::ordered_json;
  const Survey& s = answer.survey;
  const Grid grid = answer.schedule[answer.scale];
  const auto count = [](const KeyCount& c, double sparsity) {
    return Json{{"least", c.least}, {"mean", c.mean}, {"most", c.most}, {"sparsity", sparsity}};
  };
  const auto path = [](const std::string& p) { return p.empty() ? Json() : Json(p); };
  const std::string dynamic = dynamic_part(answer.method, answer.schedule, answer.scale);
  return dump({{"plan", Json::parse(answer.plan.to_json())},
               {"layer", answer.layer},
               {"scale", answer.scale},
               {"method", name_of(answer.method)},
               {"grid", {grid.h, grid.w}},
               {"queries", grid.tokens()},
               {"tokens_run", answer.plan.tokens_run(answer.scale, grid)},
               {"keys", first_keys(answer.schedule, answer.scale).back()},
               {"depends_on_picture", path(dynamic)},
               {"chosen_keys", chosen_keys(answer.method, answer.schedule, answer.scale)},
               {"counted", answer.from_run   ? "picture"
                           : dynamic.empty() ? "all"
                                             : "static part"},
               {"by_token", count(s.tokens, s.token_sparsity)},
               {"by_list", count(s.lists, s.list_sparsity)},
               {"by_block",
                {{"side", s.blocks.side},
                 {"computed", s.blocks.count()},
                 {"all", s.blocks.rows * s.blocks.columns},
                 {"sparsity", s.blocks.sparsity()}}},
               {"tokens_per_pixel", answer.tokens_per_pixel},
               {"picture", path(settings.output)},
               {"export", path(settings.plan_file)}});
}

void run(const Settings& settings) {
  check_output_file("-o", settings.output, ".png", {settings.source.file});
  check_output_file("--export", settings.plan_file, ".json", {settings.source.file});
  if (!settings.geometry.empty() && (!settings.model.empty() || !settings.prompt.empty()))
    throw Error(ErrorKind::usage, "plan: --geometry has no weights; it goes with neither --model nor --prompt");
  const Answer answer = find(settings);
  if (!settings.output.empty())
    write_png(settings.output, draw(settings, answer),
              {{"Software", "sparvar " SPARVAR_VERSION}, {"plan", answer.plan.to_json()}});
  if (!settings.plan_file.empty()) {
    const std::string text = answer.plan.to_json() + "\n";
    write_file_atomically(settings.plan_file, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }
  if (settings.json)
    print(json_report(settings, answer));
  else if (!settings.quiet)
    print(text_report(settings, answer));
}

}  // namespace

void add_plan(CLI::App& program, Action& chosen) {
  CLI::App* command =
      program.add_subcommand("plan", "Draws and counts the keys that an attention plan reads at a scale");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  add_plan_source(*command, settings->source, "sparvar");
  command->add_option("--model", settings->model, "Folder of the model (the bundled one)")->type_name("DIR");
  command
      ->add_option("--geometry", settings->geometry,
                   "Instead of a model: infinity-8b, infinity-2b, infinity-125m or a config.json")
      ->type_name("NAME");
  add_number(*command, "--scale", settings->scale, Range<int>{0, 63}, "Scale, counted from 0 (the last)");
  add_number(*command, "--layer", settings->layer, Range<int>{0, 4096}, "Layer, counted from 0 (the first sparse one)");
  command
      ->add_option_function<std::string>(
          "--show", [settings](const std::string& name) { settings->show = parse_show(name); },
          "What is drawn: the keys the method shows each token, the lists the kernel computes, or 128x128 blocks "
          "(lists)")
      ->type_name("tokens|lists|blocks");
  add_number(*command, "--tokens-per-pixel", settings->tokens_per_pixel, Range<int>{1, 4096},
             "Tokens a pixel stands for, both ways (the fewest for a width of 2048)");
  command
      ->add_option("--prompt", settings->prompt,
                   "Draw the lists of a picture of this prompt, where the plan depends on the picture")
      ->type_name("TEXT");
  add_seed(*command, settings->seed, "Seed of that picture (0)");
  command->add_option("-o,--output", settings->output, "The mask as a picture")->type_name("FILE.png");
  command->add_option("--export", settings->plan_file, "Write the plan as JSON, for --plan")->type_name("FILE.json");
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
