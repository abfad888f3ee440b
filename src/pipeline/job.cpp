#include "pipeline/job.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr std::int64_t kBatchTokens = 16384;  // of one batch, all scales: a 1M picture has 10 to 11 thousand
constexpr int kMostSkipped = 2;

Error impossible(const std::string& what) { return {ErrorKind::usage, what}; }

/// One value for all scales, or one per scale. The model's defaults belong to its own scales: a picture with more takes
/// the last one for them.
std::vector<float> per_scale(const std::vector<float>& given, const std::vector<float>& otherwise, std::size_t scales,
                             const char* name, float lowest) {
  std::vector<float> values = given;
  if (given.empty()) {
    values = otherwise;
    values.resize(scales, otherwise.back());
  }
  if (values.size() == 1) values.assign(scales, values[0]);
  if (values.size() != scales)
    throw impossible(fmt::format("{}: expected 1 value or {}, one per scale; found {}", name, scales, values.size()));
  for (const float value : values)
    if (!std::isfinite(value) || value < lowest || value > 1e4F)
      throw impossible(fmt::format("{}: {} is not a number from {} to 10000", name, value, lowest));
  return values;
}

void check_plain(const GenerateOptions& options) {
  if (options.prompts.empty()) throw impossible("no prompt");
  if (options.pictures_per_prompt < 1) throw impossible("pictures per prompt: at least 1");
  if (!(options.top_p >= 0.0F && options.top_p <= 1.0F))
    throw impossible(fmt::format("top-p: {} is not a number from 0 to 1", options.top_p));
  if (options.top_k < 0) throw impossible(fmt::format("top-k: {} is negative", options.top_k));
  if (options.batch < 0) throw impossible(fmt::format("batch: {} is negative", options.batch));
  if (options.skip_scales < 0 || options.skip_scales > kMostSkipped)
    throw impossible(fmt::format("skip-scales: expected 0 to {}, found {}", kMostSkipped, options.skip_scales));
  options.plan.validate();
}

const char* name_of(const AttentionMethod& method) {
  constexpr const char* names[] = {"dense", "csla", "cs4a", "probe"};
  return names[method.index()];
}

}  // namespace

StateShape Job::state_shape(std::int64_t count, std::int64_t text_tokens, const AttentionPlan& plan) const {
  return {.pictures = static_cast<int>(count),
          .guided = uncond_until > 0,
          .uncond_until = std::max(uncond_until, 1),
          .schedule = drawn,
          .full = schedule.back(),
          .rope_grid = rope_grid,
          .plan = plan,
          .text_tokens = text_tokens};
}

Job checked_job(const ModelConfig& config, const GenerateOptions& options, int levels) {
  check_plain(options);
  Job job;
  const PictureShape shape = picture_shape(config, options.aspect, options.size, levels);
  job.schedule = job.drawn = shape.schedule;
  job.rope_grid = shape.rope_grid;
  const std::size_t scales = job.schedule.size();
  if (static_cast<std::size_t>(options.skip_scales) >= scales)
    throw impossible(fmt::format("skip-scales: {} of {} scales leave none", options.skip_scales, scales));
  job.drawn.resize(scales - static_cast<std::size_t>(options.skip_scales));
  if (options.uncond_until < -1 || options.uncond_until > static_cast<int>(scales))
    throw impossible(
        fmt::format("uncond-until: expected a scale from 0 to {}, found {}", scales, options.uncond_until));

  job.cfg = per_scale(options.cfg, config.default_cfg, scales, "cfg", 0.0F);
  job.tau = per_scale(options.tau, config.default_tau, scales, "tau", 1e-4F);
  job.cfg.resize(job.drawn.size());
  job.tau.resize(job.drawn.size());
  if (options.uncond_until >= 0)
    for (std::size_t k = static_cast<std::size_t>(options.uncond_until); k < job.cfg.size(); ++k) job.cfg[k] = 1.0F;
  // Guidance of 1 is none: the scales at the end that have it need no unconditional half either.
  job.uncond_until = static_cast<int>(job.cfg.size());
  while (job.uncond_until > 0 && job.cfg[static_cast<std::size_t>(job.uncond_until) - 1] == 1.0F) --job.uncond_until;

  job.pictures = static_cast<std::int64_t>(options.prompts.size()) * options.pictures_per_prompt;
  std::int64_t tokens = 0;
  for (const Grid& grid : job.drawn) tokens += grid.tokens();
  job.batch = options.batch > 0 ? options.batch : std::max<std::int64_t>(1, kBatchTokens / tokens);
  job.batch = std::min(job.batch, job.pictures);
  if (options.plan.pruning) job.batch = 1;  // every picture has tokens of its own
  return job;
}

std::string attention_path(const AttentionPlan& plan, int scales, int layers, bool gpu) {
  std::set<std::string> methods;
  int first = -1, last = -1;
  for (int k = 0; k < scales; ++k)
    for (int layer = 0; layer < layers; ++layer) {
      const AttentionMethod& method = plan.method(layer, k);
      if (std::holds_alternative<DenseAttention>(method)) continue;
      methods.insert(name_of(method));
      if (first < 0) first = k;
      last = k;
    }
  if (plan.pruning && plan.pruning->first_scale < scales)
    return fmt::format("{}: tokens pruned from scale {} on, {}", plan.name, plan.pruning->first_scale,
                       methods.empty() ? std::string("dense for those that run")
                                       : fmt::format("sparse before ({})", fmt::join(methods, ", ")));
  if (methods.empty() && plan.name == "dense") return gpu ? "dense: the default on a GPU" : "dense: asked for";
  if (methods.empty())
    return fmt::format(
        "{}: dense, as none of the {} scales is one the plan thins out (short scales cost more to thin "
        "out than to compute)",
        plan.name, scales);
  return fmt::format("{}: scales {} to {} sparse ({}), the others dense, as the plan says", plan.name, first, last,
                     fmt::join(methods, ", "));
}

}  // namespace sparvar
