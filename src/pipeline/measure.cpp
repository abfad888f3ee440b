#include "pipeline/measure.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/clock.h"
#include "models/random_weights.h"
#include "pipeline/device.h"
#include "pipeline/job.h"
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

/// Of the linear layers that run on tokens; those on texts are few and left out. From `folded` rows on (0: never) what
/// the device computes in the place of ca_q and ca_proj.
double linear_flops(const ModelConfig& config, const StateShape& shape, std::int64_t folded) {
  const InfinityConfig& t = config.transformer;
  const double width = t.embed_dim;
  const double others = 4 * width * width + 2 * width * t.ffn_dim();  // qkv 3, sa_proj; fc1, fc2
  double flops = 0;
  for (int k = 0; k < static_cast<int>(shape.schedule.size()); ++k) {
    const double tokens = shape.schedule[static_cast<std::size_t>(k)].tokens();
    const bool folds = folded > 0 && shape.rows_at(k) * tokens >= static_cast<double>(folded);
    const double cross = 2 * width * (folds ? static_cast<double>(t.num_heads * shape.longest_text) : width);
    flops +=
        2.0 * tokens *
        (shape.rows_at(k) * (t.depth * (others + cross) + width * 2 * t.bits()) + shape.pictures * width * t.bits());
  }
  return flops;
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
  const LinearPtr weight =
      backend.prepare_linear(backend.random(backend.compute_type(), {side, side}, 2, 0.01F), {}, LinearKind::narrow);
  Tensor x = backend.random(backend.compute_type(), {side, side}, 1, 1.0F);
  if (weight->input != x.dtype()) {  // a norm makes what such a layer reads
    NormArgs norm;
    norm.out = weight->input;
    x = backend.layer_norm(backend.random(DType::f32, {side, side}, 1, 1.0F), norm);
  }
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

struct MeasuredModel::Impl {
  explicit Impl(MeasureOptions given)
      : options(std::move(given)), config(geometry(options.geometry)), planner(open_device(options.pipeline, true)) {
    if (planner.gpu) dry = std::make_unique<Model>(config, *planner.backend);
  }

  void tell(const std::string& what) const {
    if (options.on_progress) options.on_progress(what);
  }
  void load(std::int64_t bytes) {
    if (model) return;
    tell("weights");
    device = open_device(options.pipeline);
    LoadReport report(bytes > 0 ? options.on_load : nullptr, bytes);
    model = std::make_unique<Model>(config, *device.backend, [&report](std::int64_t more) { report.add(more); });
    report.finish();
  }
  Job job(const MeasuredRun& run) const;
  StateShape shape(const Job& job, const MeasuredRun& run) const;
  MemoryUse plan(const StateShape& shape, const MeasuredRun& run);
  Measurement measure(const MeasuredRun& run);

  MeasureOptions options;
  ModelConfig config;
  Device planner, device;
  std::unique_ptr<Model> dry, model;  // die before their devices
};

Job MeasuredModel::Impl::job(const MeasuredRun& run) const {
  GenerateOptions generate;
  generate.prompts = {""};
  generate.pictures_per_prompt = generate.batch = run.batch;
  generate.skip_scales = run.skip_scales;
  generate.uncond_until = run.uncond_until;
  generate.plan = run.plan;
  return checked_job(config, generate, static_cast<int>(config.schedule.size()));
}

StateShape MeasuredModel::Impl::shape(const Job& job, const MeasuredRun& run) const {
  StateShape shape = job.state_shape(run.batch, static_cast<std::int64_t>(run.batch) * options.text_tokens, run.plan);
  shape.longest_text = options.text_tokens;
  shape.order = run.order;
  return shape;
}

/// What the run needs of a GPU; throws where it is not there. All zero on the CPU.
MemoryUse MeasuredModel::Impl::plan(const StateShape& shape, const MeasuredRun& run) {
  if (!dry) return {};
  Backend& backend = *planner.backend;
  backend.reserve([&] { Session(dry->transformer, dry->vae, backend, shape).run_programs(); });
  const MemoryUse use = backend.memory_use();
  require_device_memory(options.geometry, use, options.pipeline.precision, run.batch);
  return use;
}

Measurement MeasuredModel::Impl::measure(const MeasuredRun& run) {
  const Job checked = job(run);
  const StateShape state = shape(checked, run);
  const MemoryUse planned = plan(state, run);
  load(planned.weights);
  Backend& backend = *device.backend;
  Measurement result;
  result.memory = {planned.weights, planned.working, planned.device_free, planned.device_total};
  result.parameters = model->weights.parameters();
  result.linear_flops = linear_flops(config, state, model->transformer.folded_rows(state));
  tell("first picture");
  const PackedText text = random_text(run.batch, options.text_tokens, config.transformer.text_channels);
  WalkInputs inputs;
  inputs.cfg = checked.cfg;
  inputs.tau = checked.tau;
  const auto start = Clock::now();
  backend.reserve([&] { Session(model->transformer, model->vae, backend, state).run_programs(); });
  Session session(model->transformer, model->vae, backend, state);
  draw(session, backend, text, inputs);
  result.first = seconds_since(start);
  std::vector<Run> runs;
  for (int r = 0; r < run.repeat; ++r) {
    tell(fmt::format("picture {} of {}", r + 1, run.repeat));
    inputs.sampling.seed = static_cast<std::uint64_t>(r);
    runs.push_back(draw(session, backend, text, inputs));
  }
  const auto middle = [&](auto value) { return median_of(runs, value); };
  result.text = middle([](const Run& one) { return one.text; });
  result.decode = middle([](const Run& one) { return one.decode; });
  result.total = middle([](const Run& one) { return one.total; });
  result.scales = runs.front().scales;
  for (std::size_t k = 0; k < result.scales.size(); ++k)
    result.scales[k].seconds = middle([k](const Run& one) { return one.scales[k].seconds; });
  result.device_bytes = backend.memory_use().device_taken;
  result.products = backend.product_times();
  result.backend = backend.describe();  // with the libraries that were loaded on the way
  return result;
}

MeasuredModel::MeasuredModel(MeasureOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
MeasuredModel::~MeasuredModel() = default;
void MeasuredModel::require(const MeasuredRun& run) { impl_->plan(impl_->shape(impl_->job(run), run), run); }
Measurement MeasuredModel::measure(const MeasuredRun& run) { return impl_->measure(run); }
double MeasuredModel::rate() {
  impl_->load(0);
  impl_->tell("matrix product");
  return product_rate(*impl_->device.backend);
}

}  // namespace sparvar
