#include "pipeline/measure.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/clock.h"
#include "models/random_weights.h"
#include "pipeline/device.h"
#include "pipeline/load_report.h"
#include "pipeline/median.h"
#include "pipeline/session.h"
#include "weights/geometry.h"

namespace sparvar {
namespace {

struct Run {
  double text = 0, decode = 0, total = 0;
  std::vector<ScaleTiming> scales;
};

Run draw(Session& session, Backend& backend, const PackedText& text, const WalkInputs& base) {
  Run run;
  WalkInputs inputs = base;
  double walked = 0;
  inputs.on_scale = [&](const ScaleTiming& timing, int) {
    run.scales.push_back(timing);
    walked += timing.seconds;
  };
  const auto start = Clock::now();
  const Tensor& codes = session.walk().run(text, inputs);
  run.text = std::max(0.0, seconds_since(start) - walked);
  const auto decoding = Clock::now();
  for (int i = 0; i < text.count(); ++i) backend.download(session.decode(codes, i));
  run.decode = seconds_since(decoding);
  run.total = seconds_since(start);
  return run;
}

/// Of the linear layers that run on tokens; those on texts are few and left out.
double linear_flops(const ModelConfig& config, int rows_a_token, int pictures) {
  const InfinityConfig& t = config.transformer;
  const double width = t.embed_dim;
  const double layer = 6 * width * width + 2 * width * t.ffn_dim();  // qkv 3, sa_proj, ca_q, ca_proj; fc1, fc2
  double tokens = 0;
  for (const Grid& grid : config.schedule) tokens += grid.tokens();
  return 2 * tokens * (rows_a_token * (t.depth * layer + width * 2 * t.bits()) + pictures * width * t.bits());
}

PackedText random_text(int count, int tokens, int channels) {
  PackedText text;
  for (int i = 0; i < count; ++i) text.offsets.push_back((i + 1) * tokens);
  text.states = make_cpu_backend({.compute = DType::f32, .threads = 0})
                    ->random(DType::f32, {static_cast<std::int64_t>(count) * tokens, channels}, 3, 0.3F);
  return text;
}

struct Model {
  Model(const ModelConfig& config, Backend& backend, std::function<void(std::int64_t)> made = {})
      : weights(config, backend, std::move(made)),
        transformer(config.transformer, weights, backend),
        vae(config.vae, weights, backend) {}
  RandomWeights weights;
  Infinity transformer;
  BsqVae vae;
};

}  // namespace

double product_rate(Backend& backend) {
  const std::int64_t side = backend.records() ? 8192 : 1024;
  const Tensor x = backend.random(backend.compute_type(), {side, side}, 1, 1.0F);
  const LinearPtr weight = backend.prepare_linear(backend.random(backend.compute_type(), {side, side}, 2, 0.01F), {});
  const auto multiply = [&] { (void)backend.linear(x, *weight, Activation::none, backend.compute_type()); };
  backend.reserve(multiply);
  std::vector<double> times;
  for (int i = 0; i < 12; ++i) {
    const MarkPtr start = backend.mark();
    multiply();
    times.push_back(backend.mark()->seconds_since(*start));
  }
  times.erase(times.begin(), times.begin() + 2);
  return 2.0 * static_cast<double>(side) * static_cast<double>(side) * static_cast<double>(side) / median(times);
}

Measurement measure_model(const MeasureOptions& options) {
  const ModelConfig config = geometry(options.geometry);
  const auto tell = [&](const std::string& what) {
    if (options.on_progress) options.on_progress(what);
  };
  const StateShape shape{.pictures = options.batch,
                         .guided = guided(config.default_cfg),
                         .schedule = config.schedule,
                         .rope_grid = config.rope_grid,
                         .plan = options.plan,
                         .text_tokens = static_cast<std::int64_t>(options.batch) * options.text_tokens,
                         .longest_text = options.text_tokens};
  Measurement result;
  if (const Device planner = open_device(options.pipeline, true); planner.gpu) {
    Model dry(config, *planner.backend);
    planner.backend->reserve([&] { Session(dry.transformer, dry.vae, *planner.backend, shape).run_programs(); });
    const MemoryUse use = planner.backend->memory_use();
    require_device_memory(options.geometry, use, options.pipeline.precision, options.batch);
    result.memory = {use.weights, use.working, use.device_free, use.device_total};
  }
  const Device device = open_device(options.pipeline);
  Backend& backend = *device.backend;
  tell("weights");
  LoadReport report(result.memory.weights > 0 ? options.on_load : nullptr, result.memory.weights);
  Model model(config, backend, [&report](std::int64_t bytes) { report.add(bytes); });
  report.finish();
  result.parameters = model.weights.parameters();
  tell("first picture");
  const PackedText text = random_text(options.batch, options.text_tokens, config.transformer.text_channels);
  WalkInputs inputs;
  inputs.cfg = config.default_cfg;
  inputs.tau = config.default_tau;
  const auto start = Clock::now();
  {
    backend.reserve([&] { Session(model.transformer, model.vae, backend, shape).run_programs(); });
    Session session(model.transformer, model.vae, backend, shape);
    draw(session, backend, text, inputs);
    result.first = seconds_since(start);
    std::vector<Run> runs;
    for (int r = 0; r < options.repeat; ++r) {
      tell(fmt::format("picture {} of {}", r + 1, options.repeat));
      inputs.sampling.seed = static_cast<std::uint64_t>(r);
      runs.push_back(draw(session, backend, text, inputs));
    }
    const auto middle = [&](auto value) { return median_of(runs, value); };
    result.text = middle([](const Run& run) { return run.text; });
    result.decode = middle([](const Run& run) { return run.decode; });
    result.total = middle([](const Run& run) { return run.total; });
    result.scales = runs.front().scales;
    for (std::size_t k = 0; k < result.scales.size(); ++k)
      result.scales[k].seconds = middle([k](const Run& run) { return run.scales[k].seconds; });
    const MemoryUse use = backend.memory_use();
    result.device_bytes = use.device_taken;
  }
  result.products = backend.product_times();
  tell("matrix product");
  result.product_rate = product_rate(backend);
  result.linear_flops = linear_flops(config, (shape.guided ? 2 : 1) * options.batch, options.batch);
  result.backend = backend.describe();
  return result;
}

}  // namespace sparvar
