#include "report.h"

#include <fmt/format.h>

#include "machine.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Sums {
  double scales = 0;
  double attention = 0;
};

Sums sum_of(const std::vector<ScaleTiming>& scales) {
  Sums sums;
  for (const ScaleTiming& scale : scales) {
    sums.scales += scale.seconds;
    sums.attention += scale.attention_seconds;
  }
  return sums;
}

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

/// The shortest decimal number that is this float: 0.7, not 0.699999988.
double shortest(float value) { return std::stod(fmt::format("{}", value)); }

std::vector<double> shortest(const std::vector<float>& values) {
  std::vector<double> out;
  out.reserve(values.size());
  for (const float value : values) out.push_back(shortest(value));
  return out;
}

Json grid_json(Grid grid) { return Json::array({grid.h, grid.w}); }

/// Values that one run's pictures share.
Json settings_json(const Run& run) {
  const auto or_default = [](const std::vector<float>& given, const std::vector<float>& preset) {
    return shortest(given.empty() ? preset : given);
  };
  return {{"cfg", or_default(run.options.cfg, run.model.default_cfg)},
          {"tau", or_default(run.options.tau, run.model.default_tau)},
          {"top_k", run.options.top_k},
          {"top_p", shortest(run.options.top_p)},
          {"greedy", run.options.greedy},
          {"dtype", name_of(run.precision)}};
}

Json plan_json(const AttentionPlan& plan) { return Json::parse(plan.to_json()); }

Json timing_json(const Run& run) {
  const Sums sums = sum_of(run.result.scales);
  Json scales = Json::array();
  for (const ScaleTiming& scale : run.result.scales) {
    scales.push_back({{"grid", grid_json(scale.grid)},
                      {"seconds", scale.seconds},
                      {"attention_seconds", scale.attention_seconds},
                      {"share_of_pairs", scale.share_of_pairs}});
  }
  return {{"load_seconds", run.load_seconds},
          {"text_seconds", run.result.text_seconds},
          {"scales", scales},
          {"scales_seconds", sums.scales},
          {"attention_seconds", sums.attention},
          {"decode_seconds", run.result.decode_seconds},
          {"total_seconds", run.result.total_seconds},
          {"pictures_per_second", ratio(static_cast<double>(run.result.pictures.size()), run.result.total_seconds)}};
}

}  // namespace

const char* name_of(Precision precision) { return precision == Precision::f32 ? "f32" : "bf16"; }

std::string dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

Json to_json(const ModelInfo& model) {
  Json schedule = Json::array();
  for (const Grid& grid : model.schedule) schedule.push_back(grid_json(grid));
  return {
      {"folder", model.model_dir},
      {"architecture", model.architecture},
      {"layers", model.layers},
      {"width", model.width},
      {"heads", model.heads},
      {"head_dim", model.head_dim},
      {"bits_per_token", model.bits},
      {"parameters",
       {{"transformer", model.transformer_parameters}, {"vae", model.vae_parameters}, {"text", model.text_parameters}}},
      {"scales", schedule},
      {"picture", {{"height", model.picture_height}, {"width", model.picture_width}}},
      {"defaults", {{"cfg", shortest(model.default_cfg)}, {"tau", shortest(model.default_tau)}}}};
}

Json machine_json(const ModelInfo& model) {
  const Machine machine = this_machine();
  return {{"processor", machine.processor},
          {"cores", machine.cores},
          {"memory_bytes", machine.memory_bytes},
          {"backend", model.backend},
          {"peak_memory_bytes", peak_memory_bytes()},
          {"gpu_memory", model.memory.total == 0 ? Json()
                                                 : Json({{"weights_bytes", model.memory.weights},
                                                         {"working_bytes", model.memory.working},
                                                         {"free_bytes", model.memory.free},
                                                         {"total_bytes", model.memory.total}})}};
}

ImageMetadata picture_metadata(const Run& run, const Picture& picture) {
  Json settings = settings_json(run);
  settings["picture"] = picture.picture_index;
  settings["prompt_index"] = picture.prompt_index;
  settings["plan"] = plan_json(run.options.plan);
  return {{"Software", "sparvar " SPARVAR_VERSION},
          {"prompt", picture.prompt},
          {"seed", std::to_string(run.options.seed)},
          {"settings", settings.dump(-1, ' ', false, Json::error_handler_t::replace)}};
}

std::string json_report(const Run& run) {
  Json pictures = Json::array();
  for (std::size_t i = 0; i < run.result.pictures.size(); ++i) {
    const Picture& picture = run.result.pictures[i];
    pictures.push_back({{"path", run.paths[i]},
                        {"prompt", picture.prompt},
                        {"prompt_index", picture.prompt_index},
                        {"picture_index", picture.picture_index},
                        {"seed", run.options.seed},
                        {"width", picture.image.width},
                        {"height", picture.image.height}});
  }
  return dump({{"pictures", pictures},
               {"settings", settings_json(run)},
               {"timings", timing_json(run)},
               {"plan", plan_json(run.options.plan)},
               {"model", to_json(run.model)},
               {"machine", machine_json(run.model)}});
}

std::string text_report(const Run& run) {
  std::string out;
  for (const std::string& path : run.paths) out += path + "\n";
  out += "\nscale   tokens   seconds  attention  pairs computed\n";
  for (std::size_t i = 0; i < run.result.scales.size(); ++i) {
    const ScaleTiming& scale = run.result.scales[i];
    out += fmt::format("{:5}  {:>7}  {:8.3f}  {:7.0f} %  {:12.1f} %\n", i,
                       fmt::format("{}x{}", scale.grid.h, scale.grid.w), scale.seconds,
                       100 * ratio(scale.attention_seconds, scale.seconds), 100 * scale.share_of_pairs);
  }
  const Sums sums = sum_of(run.result.scales);
  const auto pictures = static_cast<double>(run.result.pictures.size());
  out += fmt::format("text     {:8.3f} s\n", run.result.text_seconds);
  out += fmt::format("scales   {:8.3f} s, {:.0f} % of it attention\n", sums.scales,
                     100 * ratio(sums.attention, sums.scales));
  out += fmt::format("decode   {:8.3f} s\n", run.result.decode_seconds);
  out += fmt::format("total    {:8.3f} s, {:.3f} pictures/s, after {:.3f} s of loading\n", run.result.total_seconds,
                     ratio(pictures, run.result.total_seconds), run.load_seconds);
  out += fmt::format("attention {}, {}, {}, {:.0f} MB at most\n", run.options.plan.name, name_of(run.precision),
                     run.model.backend, static_cast<double>(peak_memory_bytes()) / 1e6);
  return out;
}

}  // namespace sparvar::cli
