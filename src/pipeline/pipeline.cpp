#include "sparvar/pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "backend/backend.h"
#include "core/cancel.h"
#include "core/clock.h"
#include "core/memory_pool.h"
#include "pipeline/counted_weights.h"
#include "pipeline/device.h"
#include "pipeline/job.h"
#include "pipeline/load_report.h"
#include "pipeline/model_files.h"
#include "pipeline/session.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"
#include "visual/bsq_vae.h"

namespace sparvar {
namespace {

Tokenizer load_tokenizer(const std::string& dir, const T5Config& config) {
  const std::string path = dir + "/spiece.model";
  Tokenizer plain(path, 0);
  constexpr int kExtraIds = 100;  // T5's <extra_id_N> follow the pieces where the embedding has room for them
  if (plain.vocabulary() > config.vocab_size)
    throw Error(ErrorKind::input, fmt::format("{}: {} pieces, but text_encoder.vocab_size in config.json is {}", path,
                                              plain.vocabulary(), config.vocab_size));
  if (plain.vocabulary() + kExtraIds <= config.vocab_size) return {path, kExtraIds};
  return plain;
}

/// The networks, on one device.
struct Networks {
  Networks(
      const ModelConfig& config, const ModelFiles& files, Backend& backend,
      const std::function<void(std::int64_t)>& took = [](std::int64_t) {})
      : text_encoder(config.text_encoder, CountedWeights(files.text, took), backend),
        transformer(config.transformer, CountedWeights(files.transformer, took), backend),
        vae(config.vae, CountedWeights(files.vae, took), backend) {}
  T5Encoder text_encoder;
  Infinity transformer;
  BsqVae vae;
};

}  // namespace

struct Pipeline::Impl {
  Impl(const PipelineOptions& given, const std::string& folder)
      : dir(folder),
        config(read_model_config(dir + "/config.json")),
        files(dir),
        tokenizer(load_tokenizer(dir, config.text_encoder)) {
    PipelineOptions options = given;
    info.weights = options.weights = weights_for(given, files.transformer.keeps_e4m3());
    const MemoryUse plan = plan_memory(options);
    device = open_device(options);
    LoadReport report(options.on_progress, files.bytes());
    networks = std::make_unique<Networks>(config, files, *device.backend, [&](std::int64_t n) { report.add(n); });
    report.finish();
    describe(plan);
  }

  std::string dir;
  ModelConfig config;
  ModelFiles files;
  Tokenizer tokenizer;
  Device device;
  std::unique_ptr<Networks> networks;
  std::unique_ptr<Session> session;  // of the last shape, on a device that records programs
  std::vector<StateShape> drawn;     // shapes that were drawn before: of their batches nothing is cold
  ModelInfo info;

  MemoryUse plan_memory(const PipelineOptions& options);
  void describe(const MemoryUse& plan);
  bool is_cold(StateShape shape);
  Session& session_for(const StateShape& shape, const GenerateOptions& options);
  std::vector<Tensor> encode(const std::vector<std::string>& prompts);
  void draw(const GenerateOptions& options, const Job& job, const std::vector<Tensor>& texts, std::int64_t first,
            std::int64_t count, WalkInputs& inputs, GenerateResult& result);
  Picture downloaded(const GenerateOptions& options, const Tensor& pixels, std::int64_t picture);
};

/// What one guided picture of a short prompt needs, found before anything is loaded; throws where it does not fit.
MemoryUse Pipeline::Impl::plan_memory(const PipelineOptions& options) {
  const Device planner = open_device(options, true);
  if (!planner.gpu) return {};
  Backend& backend = *planner.backend;
  Networks dry(config, files, backend);
  backend.reserve([&] {
    const StateShape shape{.schedule = config.schedule,
                           .rope_grid = config.rope_grid,
                           .plan = {},
                           .text_tokens = backend.length_step(),
                           .longest_text = backend.length_step()};
    Session(dry.transformer, dry.vae, backend, shape).run_programs();
  });
  const MemoryUse use = backend.memory_use();
  require_device_memory(dir, use, options.precision, 1);
  return use;
}

void Pipeline::Impl::describe(const MemoryUse& plan) {
  const WeightFormat weights = info.weights;
  info = outline(dir, config, files);
  info.weights = weights;
  info.backend = device.backend->describe();
  info.why_backend = device.backend->why();
  info.on_gpu = device.gpu;
  info.why_no_gpu = device.why_no_gpu;
  info.memory = {plan.weights, plan.working, plan.device_free, plan.device_total};
}

/// Texts of other lengths need no other primitives to speak of.
bool Pipeline::Impl::is_cold(StateShape shape) {
  shape.text_tokens = shape.longest_text = 0;
  if (std::find(drawn.begin(), drawn.end(), shape) != drawn.end()) return false;
  drawn.push_back(std::move(shape));
  return true;
}

Session& Pipeline::Impl::session_for(const StateShape& shape, const GenerateOptions& options) {
  const int previews_from = options.on_preview ? options.preview_from : Session::kNoPreviews;
  const bool watched = static_cast<bool>(options.on_attention);
  if (session && session->walk().shape() == shape && session->is_for(previews_from, watched)) return *session;
  session.reset();
  Backend& backend = *device.backend;
  backend.reserve([&] { Session(networks->transformer, networks->vae, backend, shape, previews_from).run_programs(); });
  session = std::make_unique<Session>(networks->transformer, networks->vae, backend, shape, previews_from);
  return *session;
}

std::vector<Tensor> Pipeline::Impl::encode(const std::vector<std::string>& prompts) {
  std::vector<Tensor> texts;
  texts.reserve(prompts.size());
  const int longest = std::min(512, config.transformer.text_maxlen);
  for (const std::string& prompt : prompts)
    texts.push_back(networks->text_encoder.encode(tokenizer.encode(prompt, longest)));
  return texts;
}

/// `picture`: of all that are drawn.
Picture Pipeline::Impl::downloaded(const GenerateOptions& options, const Tensor& pixels, std::int64_t picture) {
  const auto prompt = static_cast<int>(picture / options.pictures_per_prompt);
  return {to_image(device.backend->download(pixels), 0), options.prompts[static_cast<std::size_t>(prompt)], prompt,
          static_cast<int>(picture % options.pictures_per_prompt)};
}

void Pipeline::Impl::draw(const GenerateOptions& options, const Job& job, const std::vector<Tensor>& texts,
                          std::int64_t first, std::int64_t count, WalkInputs& inputs, GenerateResult& result) {
  PackedText packed;
  std::int64_t tokens = 0;
  std::int64_t longest = 0;
  for (std::int64_t i = first; i < first + count; ++i) {
    const std::int64_t length = texts[i / options.pictures_per_prompt].dim(0);
    tokens += length;
    longest = std::max(longest, length);
    packed.offsets.push_back(static_cast<int>(tokens));
  }
  packed.states = Tensor::empty(DType::f32, {tokens, config.transformer.text_channels});
  for (std::int64_t i = 0; i < count; ++i) {
    const Tensor& text = texts[(first + i) / options.pictures_per_prompt];
    std::copy_n(text.data<float>(), text.size(), packed.states.data<float>() + packed.offsets[i] * text.dim(1));
  }
  inputs.first_picture = options.first_picture + static_cast<std::uint64_t>(first);
  Backend& backend = *device.backend;
  if (backend.records()) {  // room for texts of other lengths too
    const std::int64_t step = backend.length_step();
    tokens = count * ((longest + step - 1) / step * step);
  }
  StateShape shape = job.state_shape(count, tokens, options.plan);
  if (backend.records()) shape.longest_text = tokens / count;
  const bool cold = is_cold(shape);
  Session& drawing = session_for(shape, options);
  const auto show = [&](const Tensor& codes, int k) {
    if (k < options.preview_from || k + 1 == static_cast<int>(job.drawn.size())) return;
    const auto start = Clock::now();
    for (std::int64_t i = 0; i < count; ++i) {
      throw_if_cancelled(options.cancel);
      options.on_preview(downloaded(options, drawing.preview(codes, i, k), first + i), k);
    }
    result.preview_seconds += seconds_since(start);
  };
  if (options.on_preview) inputs.on_codes = show;
  const std::vector<ScaleTiming> before = result.scales;
  const Tensor& codes = drawing.walk().run(packed, inputs);
  trim_pool();  // the transformer's activations are of no use to the decoder

  const auto start = Clock::now();
  for (std::int64_t i = 0; i < count; ++i) {
    throw_if_cancelled(options.cancel);
    result.pictures.push_back(downloaded(options, drawing.decode(codes, i), first + i));
  }
  if (!backend.records()) session.reset();
  trim_pool();
  const double decoding = seconds_since(start);
  result.decode_seconds += decoding;
  ++result.batches;
  if (!cold) return;
  ++result.cold_batches;
  result.cold_decode_seconds += decoding;
  for (std::size_t k = 0; k < before.size(); ++k)
    result.scales[k].cold_seconds += result.scales[k].seconds - before[k].seconds;
}

Pipeline::Pipeline(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Pipeline::Pipeline(Pipeline&&) noexcept = default;
Pipeline& Pipeline::operator=(Pipeline&&) noexcept = default;
Pipeline::~Pipeline() = default;

Pipeline Pipeline::load(const PipelineOptions& options) {
  return Pipeline(std::make_unique<Impl>(options, options.model_dir.empty() ? bundled_model_dir() : options.model_dir));
}

const ModelInfo& Pipeline::info() const { return impl_->info; }

GenerateResult Pipeline::generate(const GenerateOptions& options) {
  const auto start = Clock::now();
  const Job job = checked_job(impl_->config, options, impl_->files.levels());
  const bool gpu = impl_->device.gpu;
  if (gpu && options.plan.pruning)
    throw Error(ErrorKind::usage,
                fmt::format("plan {} prunes tokens, which runs on the CPU only; take --device cpu", options.plan.name));

  WalkInputs inputs;
  inputs.cfg = job.cfg;
  inputs.tau = job.tau;
  inputs.sampling = {options.seed, options.top_k, options.top_p, options.greedy};
  inputs.cancel = options.cancel;
  inputs.on_lists = options.on_lists;
  inputs.on_attention = options.on_attention;
  if (gpu && options.on_attention)
    inputs.on_attention = [&](int layer, int scale, const AttentionArgs& args) {
      Backend& backend = *impl_->device.backend;
      AttentionArgs seen;
      seen.q = backend.download(args.q.rows(0, 1));
      seen.k = backend.download(args.k.rows(0, 1));
      seen.scale = args.scale;
      options.on_attention(layer, scale, seen);
    };

  const int recorded = impl_->device.backend->recordings();
  GenerateResult result;
  result.schedule = job.schedule;
  result.uncond_until = job.uncond_until;
  result.attention_path =
      attention_path(options.plan, static_cast<int>(job.drawn.size()), impl_->config.transformer.depth, gpu);
  result.scales.resize(job.drawn.size());
  const int steps = static_cast<int>(job.drawn.size()) * static_cast<int>((job.pictures + job.batch - 1) / job.batch);
  int done = 0;
  const auto report = [&](Progress::Stage stage, Grid grid, double seconds) {
    if (options.on_progress)
      options.on_progress({.stage = stage, .done = done, .total = steps, .grid = grid, .seconds = seconds});
  };
  inputs.on_scale = [&](const ScaleTiming& timing, int k) {
    ScaleTiming& sum = result.scales[k];
    sum.grid = timing.grid;
    sum.seconds += timing.seconds;
    sum.attention_seconds += timing.attention_seconds;
    sum.share_of_pairs = timing.share_of_pairs;
    ++done;
    report(Progress::Stage::scale, timing.grid, timing.seconds);
  };

  const std::vector<Tensor> texts = impl_->encode(options.prompts);
  result.text_seconds = seconds_since(start);
  report(Progress::Stage::text, {}, result.text_seconds);
  for (std::int64_t first = 0; first < job.pictures; first += job.batch) {
    const double before = result.decode_seconds;
    impl_->draw(options, job, texts, first, std::min(job.batch, job.pictures - first), inputs, result);
    report(Progress::Stage::decode, {}, result.decode_seconds - before);
  }
  result.recordings = impl_->device.backend->recordings() - recorded;
  result.total_seconds = seconds_since(start);
  return result;
}

}  // namespace sparvar
