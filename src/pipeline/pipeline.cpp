#include "sparvar/pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>

#include "backend/backend.h"
#include "core/memory_pool.h"
#include "pipeline/device.h"
#include "pipeline/session.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"
#include "visual/bsq_vae.h"
#include "weights/safetensors.h"

namespace sparvar {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr std::int64_t kBatchTokens = 16384;  // of one batch, all scales: a 1M picture has 10 to 11 thousand

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

/// One value for all scales, or one per scale.
std::vector<float> per_scale(const std::vector<float>& given, const std::vector<float>& otherwise, std::size_t scales,
                             const char* name, float lowest) {
  std::vector<float> values = given.empty() ? otherwise : given;
  if (values.size() == 1) values.assign(scales, values[0]);
  if (values.size() != scales)
    throw Error(ErrorKind::usage,
                fmt::format("{}: expected 1 value or {}, one per scale; found {}", name, scales, values.size()));
  for (const float value : values)
    if (!std::isfinite(value) || value < lowest || value > 1e4F)
      throw Error(ErrorKind::usage, fmt::format("{}: {} is not a number from {} to 10000", name, value, lowest));
  return values;
}

struct Files {
  explicit Files(const std::string& dir)
      : transformer(TensorFile::open_in(dir, "transformer")),
        vae(TensorFile::open_in(dir, "vae")),
        text(TensorFile::open_in(dir, "text_encoder")) {}
  TensorFile transformer, vae, text;
};

/// The networks, on one device.
struct Networks {
  Networks(const ModelConfig& config, const Files& files, Backend& backend)
      : text_encoder(config.text_encoder, files.text, backend),
        transformer(config.transformer, files.transformer, backend),
        vae(config.vae, files.vae, backend) {}
  T5Encoder text_encoder;
  Infinity transformer;
  BsqVae vae;
};

}  // namespace

struct Pipeline::Impl {
  Impl(const PipelineOptions& options, const std::string& folder)
      : dir(folder),
        config(read_model_config(dir + "/config.json")),
        files(dir),
        tokenizer(load_tokenizer(dir, config.text_encoder)) {
    const MemoryUse plan = plan_memory(options);
    device = open_device(options);
    networks = std::make_unique<Networks>(config, files, *device.backend);
    describe(plan);
  }

  std::string dir;
  ModelConfig config;
  Files files;
  Tokenizer tokenizer;
  Device device;
  std::unique_ptr<Networks> networks;
  std::unique_ptr<Session> session;  // of the last shape, on a device that records programs
  ModelInfo info;

  MemoryUse plan_memory(const PipelineOptions& options);
  void describe(const MemoryUse& plan);
  StateShape shape_of(int pictures, bool guided, std::int64_t text_tokens, const AttentionPlan& plan) const;
  Session& session_for(const StateShape& shape);
  std::vector<Tensor> encode(const std::vector<std::string>& prompts);
  void draw(const GenerateOptions& options, const std::vector<Tensor>& texts, std::int64_t first, std::int64_t count,
            WalkInputs& inputs, GenerateResult& result);
};

/// What one guided picture of a short prompt needs, found before anything is loaded; throws where it does not fit.
MemoryUse Pipeline::Impl::plan_memory(const PipelineOptions& options) {
  const Device planner = open_device(options, true);
  if (!planner.gpu) return {};
  Backend& backend = *planner.backend;
  Networks dry(config, files, backend);
  backend.reserve(
      [&] { Session(dry.transformer, dry.vae, backend, shape_of(1, true, backend.length_step(), {})).run_programs(); });
  const MemoryUse use = backend.memory_use();
  constexpr std::int64_t kLibraries = 256LL << 20;  // what cuBLAS, cuDNN and the kernels themselves take
  if (use.weights + use.working + kLibraries > use.device_free) {
    const auto gib = [](std::int64_t bytes) { return static_cast<double>(bytes) / (1LL << 30); };
    throw Error(ErrorKind::system,
                fmt::format("{}: needs {:.1f} GiB of GPU memory ({:.1f} weights, {:.1f} cache and activations) and "
                            "{:.1f} of {:.1f} are free; {}",
                            dir, gib(use.weights + use.working + kLibraries), gib(use.weights), gib(use.working),
                            gib(use.device_free), gib(use.device_total),
                            options.precision == Precision::f32 ? "try --dtype bf16" : "try --device cpu"));
  }
  return use;
}

void Pipeline::Impl::describe(const MemoryUse& plan) {
  const InfinityConfig& t = config.transformer;
  info.model_dir = dir;
  info.architecture = config.architecture;
  info.layers = t.depth;
  info.width = t.embed_dim;
  info.heads = t.num_heads;
  info.head_dim = t.head_dim();
  info.bits = t.bits();
  info.transformer_parameters = files.transformer.parameters();
  info.vae_parameters = files.vae.parameters();
  info.text_parameters = files.text.parameters();
  info.schedule = config.schedule;
  const int pixels = config.vae.patch_size * (t.apply_spatial_patchify ? 2 : 1);
  info.picture_height = config.schedule.back().h * pixels;
  info.picture_width = config.schedule.back().w * pixels;
  info.default_cfg = config.default_cfg;
  info.default_tau = config.default_tau;
  info.backend = device.backend->describe();
  info.on_gpu = device.gpu;
  info.why_no_gpu = device.why_no_gpu;
  info.memory = {plan.weights, plan.working, plan.device_free, plan.device_total};
}

StateShape Pipeline::Impl::shape_of(int pictures, bool guided, std::int64_t text_tokens,
                                    const AttentionPlan& plan) const {
  return {.pictures = pictures,
          .guided = guided,
          .schedule = config.schedule,
          .rope_grid = config.rope_grid,
          .plan = plan,
          .text_tokens = text_tokens,
          .longest_text = device.backend && device.backend->records() ? text_tokens / pictures : 0};
}

Session& Pipeline::Impl::session_for(const StateShape& shape) {
  Backend& backend = *device.backend;
  if (session && session->walk().shape() == shape) return *session;
  session.reset();
  backend.reserve([&] { Session(networks->transformer, networks->vae, backend, shape).run_programs(); });
  session = std::make_unique<Session>(networks->transformer, networks->vae, backend, shape);
  return *session;
}

std::vector<Tensor> Pipeline::Impl::encode(const std::vector<std::string>& prompts) {
  std::vector<Tensor> texts;
  const int longest = std::min(512, config.transformer.text_maxlen);
  for (const std::string& prompt : prompts)
    texts.push_back(networks->text_encoder.encode(tokenizer.encode(prompt, longest)));
  return texts;
}

void Pipeline::Impl::draw(const GenerateOptions& options, const std::vector<Tensor>& texts, std::int64_t first,
                          std::int64_t count, WalkInputs& inputs, GenerateResult& result) {
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
  inputs.first_picture = static_cast<std::uint64_t>(first);
  Backend& backend = *device.backend;
  if (backend.records()) {  // room for texts of other lengths too
    const std::int64_t step = backend.length_step();
    tokens = count * ((longest + step - 1) / step * step);
  }
  Session& drawing = session_for(shape_of(static_cast<int>(count), guided(inputs.cfg), tokens, options.plan));
  const Tensor& codes = drawing.walk().run(packed, inputs);
  trim_pool();  // the transformer's activations are of no use to the decoder

  const auto start = Clock::now();
  for (std::int64_t i = 0; i < count; ++i) {
    if (options.cancel != nullptr && options.cancel->load()) throw Error(ErrorKind::cancelled, "cancelled");
    const Tensor& pixels = drawing.decode(codes, i);
    const auto prompt = static_cast<int>((first + i) / options.pictures_per_prompt);
    result.pictures.push_back({to_image(backend.download(pixels), 0), options.prompts[prompt], prompt,
                               static_cast<int>((first + i) % options.pictures_per_prompt)});
  }
  if (!backend.records()) session.reset();
  trim_pool();
  result.decode_seconds += seconds_since(start);
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
  const std::size_t scales = impl_->config.schedule.size();
  if (options.prompts.empty()) throw Error(ErrorKind::usage, "no prompt");
  if (options.pictures_per_prompt < 1) throw Error(ErrorKind::usage, "pictures per prompt: at least 1");
  if (!(options.top_p >= 0.0F && options.top_p <= 1.0F))
    throw Error(ErrorKind::usage, fmt::format("top-p: {} is not a number from 0 to 1", options.top_p));
  if (options.top_k < 0) throw Error(ErrorKind::usage, fmt::format("top-k: {} is negative", options.top_k));
  if (options.batch < 0) throw Error(ErrorKind::usage, fmt::format("batch: {} is negative", options.batch));
  options.plan.validate();

  if (impl_->device.gpu && !options.plan.is_static())
    throw Error(
        ErrorKind::usage,
        fmt::format("plan {} chooses keys as it draws, which runs on the CPU only as yet; take --device cpu, or "
                    "--attention dense, csla or csla-blocks",
                    options.plan.name));

  WalkInputs inputs;
  inputs.cfg = per_scale(options.cfg, impl_->config.default_cfg, scales, "cfg", 0.0F);
  inputs.tau = per_scale(options.tau, impl_->config.default_tau, scales, "tau", 1e-4F);
  inputs.sampling = {options.seed, options.top_k, options.top_p, options.greedy};
  inputs.cancel = options.cancel;
  inputs.on_lists = options.on_lists;

  GenerateResult result;
  result.scales.resize(scales);
  const std::int64_t pictures = static_cast<std::int64_t>(options.prompts.size()) * options.pictures_per_prompt;
  std::int64_t tokens = 0;
  for (const Grid& grid : impl_->config.schedule) tokens += grid.tokens();
  const std::int64_t batch = options.batch > 0 ? options.batch : std::max<std::int64_t>(1, kBatchTokens / tokens);
  const int steps = static_cast<int>(scales * ((pictures + batch - 1) / batch));
  int done = 0;
  const auto report = [&](Progress::Stage stage, Grid grid, double seconds) {
    if (options.on_progress) options.on_progress({stage, done, steps, grid, seconds});
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
  for (std::int64_t first = 0; first < pictures; first += batch) {
    const double before = result.decode_seconds;
    impl_->draw(options, texts, first, std::min(batch, pictures - first), inputs, result);
    report(Progress::Stage::decode, {}, result.decode_seconds - before);
  }
  result.total_seconds = seconds_since(start);
  return result;
}

}  // namespace sparvar
