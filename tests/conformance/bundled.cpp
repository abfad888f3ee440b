// The trained bundled model, whole path, teacher forced: text, transformer, decoder.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>

#include "conformance/forced.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"
#include "visual/bsq_vae.h"

namespace sparvar::conformance {
namespace {

/// numpy.packbits: most significant bit first.
Tensor unpack_bits(const Tensor& packed) {
  Tensor out = Tensor::empty(DType::u8, {1, packed.dim(0), packed.dim(1) * 8});
  for (std::int64_t i = 0; i < out.size(); ++i)
    out.data<std::uint8_t>()[i] = (packed.data<std::uint8_t>()[i / 8] >> (7 - i % 8)) & 1;
  return out;
}

// Of fp8 weights, below what an H100 gave.
constexpr double kEqualFp8Bits = 0.93;
constexpr double kFreeRunningDecibels = 12;  // another picture of the same prompt, if the worst comes

struct BitCount {
  double clear = 1e-3;               // a margin of two logits that f32 must not turn
  std::int64_t differing = 0;        // in all
  std::int64_t differing_clear = 0;  // of those with a clear margin
  std::int64_t total = 0;
};

/// f32 errs in proportion to what it adds up: 1e-3, where logits differ by 50 at most.
double clear_margin(const TensorFile& io) {
  double largest = 0;
  for (const std::string& name : io.names()) {
    if (!name.starts_with("logit_difference.")) continue;
    const Tensor values = io.get(name).to(DType::f32);
    for (std::int64_t i = 0; i < values.size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(values.data<float>()[i])));
  }
  return 1e-3 * std::max(1.0, largest / 50);
}

void count_bits(const Tensor& found, const Tensor& expected, const Tensor& logits, BitCount& count) {
  for (std::int64_t i = 0; i < found.size(); ++i) {
    if (found.data<std::uint8_t>()[i] == expected.data<std::uint8_t>()[i]) continue;
    ++count.differing;
    if (std::abs(logits.data<float>()[2 * i + 1] - logits.data<float>()[2 * i]) >= count.clear) ++count.differing_clear;
  }
  count.total += found.size();
}

/// Second minus first logit of each bit; every `step`-th token.
Tensor logit_difference(const Tensor& logits, std::int64_t step) {
  const std::int64_t bits = logits.dim(2) / 2;
  Tensor out = Tensor::empty(DType::f32, {(logits.dim(1) + step - 1) / step, bits});
  for (std::int64_t t = 0; t < out.dim(0); ++t)
    for (std::int64_t b = 0; b < bits; ++b) {
      const float* pair = logits.data<float>() + (t * step * bits + b) * 2;
      out.data<float>()[t * bits + b] = pair[1] - pair[0];
    }
  return out;
}

/// The share of bf16's bits that must equal f32's.
constexpr double kEqualShare = 0.99;

/// The largest magnitude of an f32 tensor.
double largest(const Tensor& x) {
  double found = 0;
  for (std::int64_t i = 0; i < x.size(); ++i)
    found = std::max(found, std::abs(static_cast<double>(x.data<float>()[i])));
  return found;
}

struct Model {
  Model(const std::string& dir, const Settings& settings)
      : config(read_model_config(dir + "/config.json")),
        backend(settings.backend(settings.compute())),
        tokenizer(dir + "/spiece.model", 0),
        text_file(TensorFile::open_in(dir, "text_encoder")),
        transformer_file(TensorFile::open_in(dir, "transformer")),
        vae_file(TensorFile::open_in(dir, "vae")),
        text(config.text_encoder, text_file, *backend),
        transformer(config.transformer, transformer_file, *backend),
        vae(config.vae, vae_file, *backend) {}
  ModelConfig config;
  std::unique_ptr<Backend> backend;
  Tokenizer tokenizer;
  TensorFile text_file, transformer_file, vae_file;
  T5Encoder text;
  Infinity transformer;
  BsqVae vae;
};

/// Greedy, at one guidance.
WalkOptions greedy_options(const ModelConfig& config, float cfg) {
  const std::size_t scales = config.schedule.size();
  WalkOptions options;
  options.schedule = config.schedule;
  options.rope_grid = config.rope_grid;
  options.cfg.assign(scales, cfg);
  options.tau.assign(scales, 1.0F);
  options.sampling.greedy = true;
  return options;
}

/// Every scale follows the bits of the fixture, not its own.
void force_bits(WalkOptions& options, const TensorFile& io) {
  options.forced_bits = [&io](int k) { return unpack_bits(io.get(fmt::format("bits.s{}", k))); };
}

WalkOptions forced_options(const ModelConfig& config, float cfg, const TensorFile& io) {
  WalkOptions options = greedy_options(config, cfg);
  force_bits(options, io);
  return options;
}

PackedText encoded(Model& model, const std::vector<std::int32_t>& ids) {
  PackedText text;
  text.states = model.text.encode(ids);
  text.offsets.push_back(static_cast<int>(ids.size()));
  return text;
}

/// Greedy bits of every scale, and what they draw.
struct Walked {
  std::vector<Tensor> bits;
  Image picture;
};

/// `forced`: where not null, every scale follows the bits of this fixture, not its own.
Walked walked(Model& model, const std::string& prompt, float cfg, const TensorFile* forced) {
  const PackedText text = encoded(model, model.tokenizer.encode(prompt, model.config.transformer.text_maxlen));
  WalkOptions options = greedy_options(model.config, cfg);
  if (forced != nullptr) force_bits(options, *forced);
  Walked out;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name.starts_with("bits.")) out.bits.push_back(value.to(value.dtype()));
  };
  const Tensor codes = walk(model.transformer, *model.backend, text, options);
  out.picture = to_image(model.backend->download(model.vae.draw(model.backend->upload(codes))), 0);
  return out;
}

/// What 8 bits a weight change: of the bits that follow the same ones, and of a whole picture, where every other bit
/// leads to another picture of the same kind.
void compare_with_bf16(Model& fp8, Model& bf16, const std::string& prompt, float cfg, const TensorFile& io,
                       Report& report) {
  const Walked a = walked(fp8, prompt, cfg, &io), b = walked(bf16, prompt, cfg, &io);
  std::int64_t differing = 0, total = 0;
  for (std::size_t k = 0; k < a.bits.size(); ++k) {
    differing += differing_bytes(a.bits[k], b.bits[k]);
    total += b.bits[k].size();
  }
  report.at_least("equal bits, fp8 and bf16", 1.0 - static_cast<double>(differing) / static_cast<double>(total),
                  kEqualFp8Bits);
  const double decibels = psnr(walked(fp8, prompt, cfg, nullptr).picture, walked(bf16, prompt, cfg, nullptr).picture);
  report.at_least("free-running PSNR, dB", decibels, kFreeRunningDecibels);
}

void run_prompt(Model& model, const std::string& prompt, float cfg, const TensorFile& io, const Settings& settings,
                Report& report) {
  const bool bf16 = settings.bf16;
  const auto ids = model.tokenizer.encode(prompt, model.config.transformer.text_maxlen);
  Tensor found_ids = Tensor::empty(DType::i32, {static_cast<std::int64_t>(ids.size())});
  std::copy(ids.begin(), ids.end(), found_ids.data<std::int32_t>());
  report.compare("ids", found_ids, io.get("ids"), 0);

  // bf16 is judged by bits and pictures; its intermediate tensors only have to be of the right size.
  const double loose = bf16 ? 1e3 : 1.0;
  const PackedText text = encoded(model, ids);
  const Tensor& hidden = io.get("text_hidden");  // bf16 has 8 bits: what it rounds depends on the largest values
  report.compare("text_hidden", text.states, hidden, bf16 ? 5e-3 * std::max(4.0, largest(hidden)) : 2e-5);

  WalkOptions options = forced_options(model.config, cfg, io);
  options.order = settings.order;
  BitCount bits{.clear = clear_margin(io)};
  Tensor logits;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name == "cond_BD") report.compare(name, value, io.get(name), 2e-5 * loose);
    if (name.starts_with("bits.")) count_bits(value, unpack_bits(io.get(name)), logits, bits);
    if (!name.starts_with("logits_cfg")) return;
    logits = value.to(DType::f32);
    const std::string wanted = "logit_difference" + name.substr(name.find('.'));
    if (!io.has(wanted)) return;
    const Tensor& expected = io.get(wanted);
    report.compare(wanted, logit_difference(logits, (value.dim(1) + expected.dim(0) - 1) / expected.dim(0)), expected,
                   bf16 ? 1e2 : 5 * bits.clear);
  };
  const Tensor codes = walk(model.transformer, *model.backend, text, options);
  report.count("bits with a clear margin", bf16 ? 0 : bits.differing_clear, bits.total);
  if (bf16)
    report.at_least("share of equal bits", 1.0 - static_cast<double>(bits.differing) / static_cast<double>(bits.total),
                    settings.fp8 ? kEqualFp8Bits : kEqualShare);
  else
    report.count("bits", bits.differing, bits.total, 2 * bits.total / 10000);
  if (io.has("summed_codes")) report.compare("summed_codes", codes, io.get("summed_codes"), 1e-5);
  if (!io.has("image_u8_rgb_hwc")) return;
  const Image picture = to_image(model.backend->download(model.vae.draw(model.backend->upload(codes))), 0);
  const Tensor& expected = io.get("image_u8_rgb_hwc");
  Image wanted{static_cast<int>(expected.dim(-2)), static_cast<int>(expected.dim(-3)), {}};
  wanted.rgb.assign(expected.data<std::uint8_t>(), expected.data<std::uint8_t>() + expected.size());
  if (bf16)
    report.at_least("picture PSNR, dB", psnr(picture, wanted), 30);
  else
    report.compare("image_u8_rgb_hwc",
                   Tensor(const_cast<std::uint8_t*>(picture.rgb.data()), DType::u8, expected.shape(), nullptr),
                   expected, 1);
}

/// From the prompt on, text encoder included.
void compare_prompt(Model& model, Model& reference, const std::string& prompt, const WalkOptions& options,
                    const Settings& settings, Report& report) {
  const auto ids = model.tokenizer.encode(prompt, model.config.transformer.text_maxlen);
  const ForcedRun first =
      run_forced(reference.transformer, *reference.backend, encoded(reference, ids), options, settings.reference());
  const ForcedRun found = run_forced(model.transformer, *model.backend, encoded(model, ids), options, settings, &first);
  compare_forced(prompt, found, first, settings, report);
}

}  // namespace

void run_bundled(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  Model model(settings.model_dir, settings);
  std::optional<Model> reference;
  if (!settings.against.empty()) reference.emplace(settings.model_dir, settings.reference());
  for (const auto& [prompt, entry] : config.items()) {
    const std::string path = dir + "/" + entry.at("file").get<std::string>();
    if (!std::filesystem::exists(path)) continue;  // thinned copies keep one prompt
    const TensorFile io = TensorFile::open(path);
    const auto cfg = entry.at("cfg").get<float>();
    if (reference) {
      compare_prompt(model, *reference, prompt, forced_options(model.config, cfg, io), settings, report);
      continue;
    }
    run_prompt(model, prompt, cfg, io, settings, report);
    if (settings.fp8) {
      Settings plain = settings;
      plain.fp8 = false;
      Model other(plain.model_dir, plain);
      compare_with_bf16(model, other, prompt, cfg, io, report);
    }
  }
}

}  // namespace sparvar::conformance
