#include "sparvar/pipeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>

#include "backend/backend.h"
#include "core/memory_pool.h"
#include "pipeline/walk.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"
#include "visual/bsq_vae.h"

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

}  // namespace

struct Pipeline::Impl {
  Impl(const PipelineOptions& options, const std::string& folder)
      : dir(folder),
        config(read_model_config(dir + "/config.json")),
        backend(make_cpu_backend(
            {.compute = options.precision == Precision::f32 ? DType::f32 : DType::bf16, .threads = options.threads})),
        tokenizer(load_tokenizer(dir, config.text_encoder)),
        transformer_file(TensorFile::open_in(dir, "transformer")),
        vae_file(TensorFile::open_in(dir, "vae")),
        text_file(TensorFile::open_in(dir, "text_encoder")),
        text_encoder(config.text_encoder, text_file, *backend),
        transformer(config.transformer, transformer_file, *backend),
        vae(config.vae, vae_file, *backend) {
    const InfinityConfig& t = config.transformer;
    info.model_dir = dir;
    info.architecture = config.architecture;
    info.layers = t.depth;
    info.width = t.embed_dim;
    info.heads = t.num_heads;
    info.head_dim = t.head_dim();
    info.bits = t.bits();
    info.transformer_parameters = transformer_file.parameters();
    info.vae_parameters = vae_file.parameters();
    info.text_parameters = text_file.parameters();
    info.schedule = config.schedule;
    const int pixels = config.vae.patch_size * (t.apply_spatial_patchify ? 2 : 1);
    info.picture_height = config.schedule.back().h * pixels;
    info.picture_width = config.schedule.back().w * pixels;
    info.default_cfg = config.default_cfg;
    info.default_tau = config.default_tau;
    info.backend = backend->describe();
  }

  std::string dir;
  ModelConfig config;
  std::unique_ptr<Backend> backend;
  Tokenizer tokenizer;
  TensorFile transformer_file, vae_file, text_file;
  T5Encoder text_encoder;
  Infinity transformer;
  BsqVae vae;
  ModelInfo info;

  std::vector<Tensor> encode(const std::vector<std::string>& prompts);
  void draw(const GenerateOptions& options, const std::vector<Tensor>& texts, std::int64_t first, std::int64_t count,
            WalkOptions& walk_options, GenerateResult& result);
};

std::vector<Tensor> Pipeline::Impl::encode(const std::vector<std::string>& prompts) {
  std::vector<Tensor> texts;
  const int longest = std::min(512, config.transformer.text_maxlen);
  for (const std::string& prompt : prompts) texts.push_back(text_encoder.encode(tokenizer.encode(prompt, longest)));
  return texts;
}

void Pipeline::Impl::draw(const GenerateOptions& options, const std::vector<Tensor>& texts, std::int64_t first,
                          std::int64_t count, WalkOptions& walk_options, GenerateResult& result) {
  PackedText packed;
  std::int64_t tokens = 0;
  for (std::int64_t i = first; i < first + count; ++i) {
    tokens += texts[i / options.pictures_per_prompt].dim(0);
    packed.offsets.push_back(static_cast<int>(tokens));
  }
  packed.states = Tensor::empty(DType::f32, {tokens, config.transformer.text_channels});
  for (std::int64_t i = 0; i < count; ++i) {
    const Tensor& text = texts[(first + i) / options.pictures_per_prompt];
    std::copy_n(text.data<float>(), text.size(), packed.states.data<float>() + packed.offsets[i] * text.dim(1));
  }
  walk_options.first_picture = static_cast<std::uint64_t>(first);
  Tensor codes = walk(transformer, packed, walk_options);
  trim_pool();  // the transformer's activations are of no use to the decoder

  const auto start = Clock::now();
  for (std::int64_t i = 0; i < count; ++i) {  // one by one: a decoder's feature maps are the largest tensors of all
    if (options.cancel != nullptr && options.cancel->load()) throw Error(ErrorKind::cancelled, "cancelled");
    const Tensor decoded = vae.decode(codes.rows(i, i + 1));
    const auto prompt = static_cast<int>((first + i) / options.pictures_per_prompt);
    result.pictures.push_back({to_image(decoded, 0), options.prompts[prompt], prompt,
                               static_cast<int>((first + i) % options.pictures_per_prompt)});
  }
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

  WalkOptions walk_options;
  walk_options.schedule = impl_->config.schedule;
  walk_options.rope_grid = impl_->config.rope_grid;
  walk_options.plan = options.plan;
  walk_options.cfg = per_scale(options.cfg, impl_->config.default_cfg, scales, "cfg", 0.0F);
  walk_options.tau = per_scale(options.tau, impl_->config.default_tau, scales, "tau", 1e-4F);
  walk_options.sampling = {options.seed, options.top_k, options.top_p, options.greedy};
  walk_options.cancel = options.cancel;

  GenerateResult result;
  result.scales.resize(scales);
  const std::int64_t pictures = static_cast<std::int64_t>(options.prompts.size()) * options.pictures_per_prompt;
  std::int64_t tokens = 0;
  for (const Grid& grid : walk_options.schedule) tokens += grid.tokens();
  const std::int64_t batch = options.batch > 0 ? options.batch : std::max<std::int64_t>(1, kBatchTokens / tokens);
  const int steps = static_cast<int>(scales * ((pictures + batch - 1) / batch));
  int done = 0;
  const auto report = [&](Progress::Stage stage, Grid grid, double seconds) {
    if (options.on_progress) options.on_progress({stage, done, steps, grid, seconds});
  };
  walk_options.on_scale = [&](const ScaleTiming& timing, int k) {
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
    impl_->draw(options, texts, first, std::min(batch, pictures - first), walk_options, result);
    report(Progress::Stage::decode, {}, result.decode_seconds - before);
  }
  result.total_seconds = seconds_since(start);
  return result;
}

}  // namespace sparvar
