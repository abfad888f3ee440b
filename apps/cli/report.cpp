#include "report.h"

#include <fmt/format.h>

#include <filesystem>
#include <utility>

#include "flags.h"
#include "machine.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Sums {
  double scales = 0;
  double cold = 0;
  double attention = 0;
};

Sums sum_of(const std::vector<ScaleTiming>& scales) {
  Sums sums;
  for (const ScaleTiming& scale : scales) {
    sums.scales += scale.seconds;
    sums.cold += scale.cold_seconds;
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
          {"aspect", run.options.aspect},
          {"size", run.options.size},
          {"skip_scales", run.options.skip_scales},
          {"uncond_until", run.options.uncond_until},
          {"dtype", name_of(run.precision)},
          {"weights", name_of(run.weights, run.precision)}};
}

Json memory_json(const MemoryPlan& plan) {
  if (plan.peak == 0) return {};
  return {{"planned_peak_bytes", plan.peak},       {"program_bytes", plan.program},
          {"weights_bytes", plan.weights},         {"cache_bytes", plan.cache},
          {"activations_bytes", plan.activations}, {"decoder_bytes", plan.decoder},
          {"pictures_bytes", plan.pictures},       {"batch", plan.batch}};
}

Json plan_json(const AttentionPlan& plan) { return Json::parse(plan.to_json()); }

Json timing_json(const Run& run) {
  const Sums sums = sum_of(run.result.scales);
  Json scales = Json::array();
  for (const ScaleTiming& scale : run.result.scales) {
    scales.push_back({{"grid", grid_json(scale.grid)},
                      {"seconds", scale.seconds},
                      {"cold_seconds", scale.cold_seconds},
                      {"attention_seconds", scale.attention_seconds},
                      {"share_of_pairs", scale.share_of_pairs}});
  }
  return {{"load_seconds", run.load_seconds},
          {"text_seconds", run.result.text_seconds},
          {"scales", scales},
          {"scales_seconds", sums.scales},
          {"attention_seconds", sums.attention},
          {"decode_seconds", run.result.decode_seconds},
          {"cold_decode_seconds", run.result.cold_decode_seconds},
          {"preview_seconds", run.result.preview_seconds},
          {"batches", run.result.batches},
          {"cold_batches", run.result.cold_batches},
          {"recordings", run.result.recordings},
          {"total_seconds", run.result.total_seconds},
          {"pictures_per_second", ratio(static_cast<double>(run.result.pictures.size()), run.result.total_seconds)}};
}

}  // namespace

const char* name_of(Precision precision) { return precision == Precision::f32 ? "f32" : "bf16"; }
const char* name_of(WeightFormat weights, Precision precision) {
  return weights == WeightFormat::fp8 ? "fp8" : name_of(precision);
}

std::string dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

Json to_json(const ModelInfo& model) {
  Json schedule = Json::array();
  for (const Grid& grid : model.schedule) schedule.push_back(grid_json(grid));
  return {
      {"folder", model.model_dir},
      {"hash", model.model_hash},
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
          {"why_backend", model.why_backend},
          {"why_no_gpu", model.why_no_gpu},
          {"peak_memory_bytes", peak_memory_bytes()},
          {"gpu_memory", model.memory.total == 0 ? Json()
                                                 : Json({{"weights_bytes", model.memory.weights},
                                                         {"working_bytes", model.memory.working},
                                                         {"free_bytes", model.memory.free},
                                                         {"total_bytes", model.memory.total}})}};
}

std::string memory_line(const MemoryPlan& plan) {
  std::string parts;
  const std::pair<const char*, std::int64_t> all[] = {{"program", plan.program}, {"weights", plan.weights},
                                                      {"KV cache", plan.cache},  {"activations", plan.activations},
                                                      {"decoder", plan.decoder}, {"pictures", plan.pictures}};
  for (const auto& [name, bytes] : all)
    parts += fmt::format("{}{} {}", parts.empty() ? "" : ", ", name, bytes_text(bytes));
  return fmt::format("memory: {} at most (estimate): {}; {} a batch, {}", bytes_text(plan.peak), parts,
                     plan.batch == 1 ? "1 picture" : fmt::format("{} pictures", plan.batch), name_of(plan.precision));
}

ImageMetadata picture_metadata(const Run& run, const Picture& picture) {
  Json settings = settings_json(run);
  settings["picture"] =
      run.options.first_picture +
      static_cast<std::uint64_t>(picture.prompt_index) * static_cast<std::uint64_t>(run.options.pictures_per_prompt) +
      static_cast<std::uint64_t>(picture.picture_index);
  settings["picture_index"] = picture.picture_index;
  settings["prompt_index"] = picture.prompt_index;
  settings["plan"] = plan_json(run.options.plan);
  settings["plan"].erase("note");  // for readers of the plan's file, not for every picture
  return {{"Software", "sparvar " SPARVAR_VERSION},
          {"prompt", picture.prompt},
          {"seed", std::to_string(run.options.seed)},
          {"model", std::filesystem::path(run.model.model_dir).lexically_normal().filename().string()},
          {"model_hash", run.model.model_hash},
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
               {"attention", run.result.attention_path},
               {"uncond_scales", run.result.uncond_until},
               {"memory", memory_json(run.memory)},
               {"timings", timing_json(run)},
               {"plan", plan_json(run.options.plan)},
               {"model", to_json(run.model)},
               {"machine", machine_json(run.model)}});
}

std::string text_report(const Run& run) {
  const GenerateResult& result = run.result;
  const int warm_batches = result.batches - result.cold_batches;
  // Seconds of one batch that was cold or warm; "-" where there was none.
  const auto each = [](double seconds, int batches) {
    return batches > 0 ? fmt::format("{:.3f}", seconds / batches) : std::string("-");
  };
  const auto cold_and_warm = [&](double cold, double all) {
    return fmt::format("{:>8}  {:>8}", each(cold, result.cold_batches), each(all - cold, warm_batches));
  };
  std::string out;
  for (const std::string& path : run.paths) out += path + "\n";
  out += "\nscale   tokens      cold      warm  attention  pairs computed\n";
  for (std::size_t i = 0; i < result.scales.size(); ++i) {
    const ScaleTiming& scale = result.scales[i];
    out += fmt::format("{:5}  {:>7}  {}  {:7.0f} %  {:12.1f} %\n", i, fmt::format("{}x{}", scale.grid.h, scale.grid.w),
                       cold_and_warm(scale.cold_seconds, scale.seconds),
                       100 * ratio(scale.attention_seconds, scale.seconds), 100 * scale.share_of_pairs);
  }
  if (result.scales.size() < result.schedule.size())
    out += fmt::format("       {:>7}  left out\n",
                       fmt::format("{}x{}", result.schedule.back().h, result.schedule.back().w));
  const Sums sums = sum_of(result.scales);
  out += fmt::format("scales          {}  {:7.0f} %\n", cold_and_warm(sums.cold, sums.scales),
                     100 * ratio(sums.attention, sums.scales));
  out += fmt::format("decode          {}\n", cold_and_warm(result.cold_decode_seconds, result.decode_seconds));
  out += fmt::format("seconds of a batch: {} cold (weights are packed, memory is fresh), {} warm\n\n",
                     result.cold_batches, warm_batches);
  out += fmt::format("load     {:8.3f} s\ntext     {:8.3f} s\n", run.load_seconds, result.text_seconds);
  if (result.preview_seconds > 0) out += fmt::format("previews {:8.3f} s\n", result.preview_seconds);
  out += fmt::format("total    {:8.3f} s, {:.3f} pictures/s, loading not counted\n", result.total_seconds,
                     ratio(static_cast<double>(result.pictures.size()), result.total_seconds));
  out += fmt::format("guidance {}\n", result.uncond_until == 0 ? std::string("none")
                                      : result.uncond_until == static_cast<int>(result.scales.size())
                                          ? std::string("at all scales")
                                          : fmt::format("at scales 0 to {}", result.uncond_until - 1));
  out += fmt::format("attention {}\n", result.attention_path);
  out += fmt::format("runs on  {}, {}", run.model.backend, name_of(run.precision));
  for (const std::string& why : {run.model.why_backend, run.model.why_no_gpu})
    if (!why.empty()) out += "; " + why;
  out += fmt::format("\nmemory   {} at most", bytes_text(peak_memory_bytes()));
  if (run.memory.peak > 0) out += fmt::format(", {} were planned", bytes_text(run.memory.peak));
  return out + "\n";
}

}  // namespace sparvar::cli
