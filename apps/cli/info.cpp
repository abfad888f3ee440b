// sparvar info: what model this is, and what it runs on; or how a picture was drawn.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "image/atomic_file.h"
#include "machine.h"
#include "picture_info.h"
#include "pipeline/job.h"
#include "progress.h"
#include "report.h"

namespace sparvar::cli {
namespace {

struct Settings {
  PipelineOptions pipeline;
  std::string picture;
  std::string plan_out;
  bool json = false;
  bool quiet = false;
};

std::string numbers(const std::vector<float>& values) { return fmt::format("{}", fmt::join(values, ",")); }

/// `plan`: plan.json of the folder, where there is one.
std::string text_info(const ModelInfo& model, const std::optional<AttentionPlan>& plan) {
  const Machine machine = this_machine();
  std::string scales;
  std::int64_t tokens = 0;
  for (const Grid& grid : model.schedule) {
    scales += fmt::format("{}{}x{}", scales.empty() ? "" : " ", grid.h, grid.w);
    tokens += grid.tokens();
  }
  const auto millions = [](std::int64_t parameters) { return static_cast<double>(parameters) / 1e6; };
  std::string out;
  out += fmt::format("model         {}\n", model.model_dir);
  out += fmt::format("hash          {}\n", model.model_hash);
  out += fmt::format("architecture  {}: {} layers, width {}, {} heads of {}, {} bits a token\n", model.architecture,
                     model.layers, model.width, model.heads, model.head_dim, model.bits);
  out += fmt::format("parameters    {:.1f} M: transformer {:.1f} M, picture decoder {:.1f} M, text encoder {:.1f} M\n",
                     millions(model.transformer_parameters + model.vae_parameters + model.text_parameters),
                     millions(model.transformer_parameters), millions(model.vae_parameters),
                     millions(model.text_parameters));
  out += fmt::format("picture       {}x{} (height x width)\n", model.picture_height, model.picture_width);
  out += fmt::format("scales        {}: {}; {} tokens\n", model.schedule.size(), scales, tokens);
  out += fmt::format("defaults      cfg {}, tau {}\n", numbers(model.default_cfg), numbers(model.default_tau));
  out += fmt::format("attention     {}\n", fmt::join(AttentionPlan::preset_names(), ", "));
  if (plan)
    out += fmt::format("default plan  plan.json, {}\n",
                       attention_path(*plan, static_cast<int>(model.schedule.size()), model.layers, model.on_gpu));
  out += fmt::format("machine       {}, {} cores, {:.1f} GB\n", machine.processor, machine.cores,
                     static_cast<double>(machine.memory_bytes) / 1e9);
  out += fmt::format("runs on       {}{}\n", model.backend,
                     model.why_no_gpu.empty() ? "" : fmt::format(" ({})", model.why_no_gpu));
  if (!model.why_backend.empty()) out += fmt::format("because       {}\n", model.why_backend);
  if (model.memory.total > 0) {
    const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
    out += fmt::format(
        "GPU memory    {:.0f} MiB: weights {:.0f}, cache and activations {:.0f}; {:.0f} of {:.0f} are free\n",
        mib(model.memory.weights + model.memory.working), mib(model.memory.weights), mib(model.memory.working),
        mib(model.memory.free), mib(model.memory.total));
  }
  return out;
}

void about_picture(const Settings& settings) {
  if (settings.plan_out.empty()) return print(picture_report(settings.picture, settings.json));
  const std::string plan = plan_text(read_image_metadata(settings.picture));
  if (plan.empty())
    throw Error(
        ErrorKind::input,
        fmt::format("{}: holds no attention plan; --plan-out is for pictures that sparvar drew", settings.picture));
  write_file_atomically(settings.plan_out, {reinterpret_cast<const std::uint8_t*>(plan.data()), plan.size()});
}

void info(const Settings& settings) {
  if (!settings.picture.empty()) return about_picture(settings);
  if (!settings.plan_out.empty()) throw Error(ErrorKind::usage, "--plan-out writes the plan of a picture: name one");
  ProgressDisplay display(settings.quiet);
  PipelineOptions options = settings.pipeline;
  options.on_progress = [&display](const Progress& progress) {
    if (progress.bytes_done < progress.bytes_total)
      display.show(progress);  // that it is loaded is not worth a line here
  };
  const std::optional<AttentionPlan> plan = model_plan(options.model_dir);  // what is wrong with it costs no loading
  const Pipeline pipeline = Pipeline::load(options);
  display.clear();
  const ModelInfo& model = pipeline.info();
  if (settings.json) {
    using Json = nlohmann::ordered_json;
    print(dump({{"model", to_json(model)},
                {"machine", machine_json(model)},
                {"plans", AttentionPlan::preset_names()},
                {"default_plan", plan ? Json::parse(plan->to_json()) : Json()}}));
  } else {
    print(text_info(model, plan));
  }
}

}  // namespace

void add_info(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand("info", "Says what the model is and what this machine runs it with");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  command->add_option("picture", settings->picture, "A picture: says how it was drawn, and how to draw it again")
      ->option_text("[PICTURE]");
  command->add_option("--plan-out", settings->plan_out, "Writes the picture's attention plan as JSON")
      ->type_name("FILE");
  command->add_option("--model", settings->pipeline.model_dir, "Folder of the model (the bundled one)")
      ->type_name("DIR");
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_weights(*command, settings->pipeline);
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress");
  command->callback([settings, &chosen] { chosen = [settings] { info(*settings); }; });
}

}  // namespace sparvar::cli
