// Random-weight Infinity models, scale by scale: teacher forced against every tensor, then free-running against the
// bits.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "bits/codes.h"
#include "conformance/forced.h"
#include "core/resolutions.h"
#include "sparvar/error.h"
#include "visual/bsq_vae.h"

namespace sparvar::conformance {
namespace {

InfinityConfig read_transformer(const nlohmann::json& c) {
  InfinityConfig out;
  out.depth = c.at("depth");
  out.embed_dim = c.at("embed_dim");
  out.num_heads = c.at("num_heads");
  out.block_chunks = c.at("block_chunks");
  out.mlp_ratio = c.value("mlp_ratio", 4.0);
  out.text_channels = c.at("text_channels");
  out.text_maxlen = c.at("text_maxlen");
  out.codebook_dim = c.at("vae").at("codebook_dim");
  out.apply_spatial_patchify = c.value("apply_spatial_patchify", 0) != 0;
  out.rope2d_normalized_by_hw = c.value("rope2d_normalized_by_hw", 2);
  out.rope2d_each_sa_layer = c.value("rope2d_each_sa_layer", 1) != 0;
  out.add_lvl_embeding_only_first_block = c.value("add_lvl_embeding_only_first_block", 1) != 0;
  out.cos_attn = c.value("cos_attn", true);
  out.shared_aln = c.value("shared_aln", true);
  out.nm0 = c.value("nm0", false);
  out.norm_eps = c.value("norm_eps", 1e-6);
  out.rope_base = c.value("rope_base", 10000.0);
  out.cfg_insertion_layer = c.value("cfg_insertion_layer", std::vector<int>{0});
  return out;
}

VaeConfig read_vae(const nlohmann::json& c) {
  return {.codebook_dim = c.at("codebook_dim"),
          .patch_size = c.at("patch_size"),
          .ch = c.at("base_ch"),
          .ch_mult = c.at("ch_mult"),
          .num_res_blocks = c.at("num_res_blocks"),
          .norm_num_groups = c.value("group_norm_groups", 32),
          .norm_eps = c.value("group_norm_eps", 1e-6)};
}

/// About five times the difference between float32 and float64 that the fixtures state, by the name before ".s".
double tolerance(const std::string& name, const nlohmann::json& config) {
  static const std::map<std::string, double> kStated = {
      {"text_normed", 6e-7},   {"cond_BD", 9e-7},       {"ca_kv", 9e-7},        {"cond_gss", 2e-7},
      {"word_embed", 2e-6},    {"block_input", 2e-6},   {"sub", 2e-6},          {"hidden", 2e-5},
      {"logits_cond", 2e-5},   {"logits_uncond", 2e-5}, {"logits_cfg", 1.4e-4}, {"summed_codes", 2e-6},
      {"next_features", 2e-6}, {"image_rgb_sub2", 4e-5}};
  const std::string kind = name.substr(0, name.find(".s"));
  const auto& measured = config.at("check").at("max_abs_diff_fp32_vs_float64");
  const char* key = kind == "logits_cond" || kind == "logits_uncond" ? "logits_raw"
                    : kind == "image_rgb_sub2"                       ? "image_rgb"
                                                                     : kind.c_str();
  return 5 * std::max(kStated.at(kind), measured.value(key, 0.0));
}

/// Rows 0 and B of [2B, n, C], where the fixture holds only the first sample's two halves.
Tensor first_sample(const Tensor& x) {
  const std::int64_t half = x.dim(0) / 2;
  const Tensor a = x.rows(0, 1), b = x.rows(half, half + 1);
  Shape shape = x.shape();
  shape[0] = 2;
  Tensor out = Tensor::empty(x.dtype(), shape);
  std::copy_n(a.data<std::byte>(), a.bytes(), out.data<std::byte>());
  std::copy_n(b.data<std::byte>(), b.bytes(), out.data<std::byte>() + a.bytes());
  return out;
}

/// Differing bits whose two logits are further apart than 1e-3 (nearer ones may fall either way).
std::int64_t wrong_bits(const Tensor& bits, const Tensor& expected, const Tensor& logits) {
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < bits.size(); ++i)
    if (bits.data<std::uint8_t>()[i] != expected.data<std::uint8_t>()[i] &&
        std::abs(logits.data<float>()[2 * i] - logits.data<float>()[2 * i + 1]) >= 1e-3F)
      ++wrong;
  return wrong;
}

void compare_picture(BsqVae& vae, Backend& backend, const Tensor& codes, const TensorFile& io,
                     const nlohmann::json& config, Report& report) {
  if (io.has("image_rgb_sub2")) {
    const Tensor decoded = vae.decode(codes);
    const Tensor expected = io.get("image_rgb_sub2").to(DType::f32);
    Tensor thin = Tensor::empty(DType::f32, expected.shape());
    const std::int64_t h = decoded.dim(2), w = decoded.dim(3);
    for (std::int64_t c = 0; c < 3; ++c)
      for (std::int64_t y = 0; y < expected.dim(2); ++y)
        for (std::int64_t x = 0; x < expected.dim(3); ++x)
          thin.data<float>()[(c * expected.dim(2) + y) * expected.dim(3) + x] =
              (decoded.data<float>()[(c * h + 2 * y) * w + 2 * x] + 1) / 2;
    report.compare("image_rgb_sub2", thin, expected, tolerance("image_rgb_sub2", config));
  }
  if (io.has("image_u8_rgb_hwc")) {
    const Tensor found = backend.download(vae.draw(backend.upload(codes)));
    report.compare("image_u8_rgb_hwc", found, io.get("image_u8_rgb_hwc"), 1);
  }
}

}  // namespace

void run_infinity(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  const auto backend = settings.backend(settings.compute());
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  const TensorFile weights = TensorFile::open(dir + "/weights.safetensors");
  Infinity model(read_transformer(config), weights, *backend);

  PackedText text;
  text.states = io.get("kv_cond").to(DType::f32);
  for (const int length : config.at("lens").get<std::vector<int>>())
    text.offsets.push_back(text.offsets.back() + length);

  WalkOptions options;
  options.schedule = read_schedule(config.at("scale_schedule"));
  const ScaleSchedule* full = schedule_1m(config.at("h_div_w_template").get<double>());
  options.rope_grid = full != nullptr ? full->back() : options.schedule.back();
  options.cfg = config.at("cfg_list").get<std::vector<float>>();
  options.tau = config.at("tau_list").get<std::vector<float>>();
  options.sampling.greedy = true;
  options.order = settings.order;
  options.forced_bits = [&](int k) { return io.get(fmt::format("bits.s{}", k)); };
  if (!settings.against.empty()) {
    const auto other = settings.reference().backend(settings.reference().compute());
    Infinity reference(read_transformer(config), weights, *other);
    const ForcedRun first = run_forced(reference, *other, text, options, settings.reference());
    return compare_forced("bits", run_forced(model, *backend, text, options, settings, &first), first, settings,
                          report);
  }
  Tensor logits;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name.starts_with("logits_cfg")) logits = value.to(DType::f32);
    if (!io.has(name)) return;
    const Tensor& expected = io.get(name);
    if (name.starts_with("bits"))
      report.count(name, wrong_bits(value, expected, logits), value.size());
    else
      report.compare(name, value.size() != expected.size() && expected.dim(0) == 2 ? first_sample(value) : value,
                     expected, tolerance(name, config));
  };
  const Tensor codes = walk(model, *backend, text, options);
  if (io.has("image_u8_rgb_hwc") || io.has("image_rgb_sub2")) {
    const TensorFile vae_weights = TensorFile::open(dir + "/vae.safetensors");
    BsqVae vae(read_vae(config.at("vae")), vae_weights, *backend);
    compare_picture(vae, *backend, codes.rows(0, 1), io, config, report);
  }

  std::int64_t differing = 0, total = 0;
  options.forced_bits = {};
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (!name.starts_with("bits") || !io.has(name)) return;
    differing += differing_bytes(value, io.get(name));
    total += value.size();
  };
  walk(model, *backend, text, options);
  report.count("bits, free-running", differing, total, config.at("check").value("bits_margin_below_1e_3", 0));
}

void run_vae(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  const auto backend = settings.backend(DType::f32);
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  const TensorFile weights = TensorFile::open(dir + "/weights.safetensors");
  BsqVae vae(read_vae(config.at("vae")), weights, *backend);

  const Tensor& pixels = io.get("image_u8_rgb_hwc");
  Image image;
  image.height = static_cast<int>(pixels.dim(-3));
  image.width = static_cast<int>(pixels.dim(-2));
  image.rgb.assign(pixels.data<std::uint8_t>(), pixels.data<std::uint8_t>() + pixels.size());
  const Tensor expected = io.get("encoder_features").to(DType::f32);
  report.compare("encoder_features", vae.encode(from_image(image)), expected, 2e-4);

  const Quantized quantized = quantize(expected, read_schedule(config.at("vae_scale_schedule")));
  for (std::size_t k = 0; k < quantized.bits.size(); ++k) {
    const auto compare = [&](const char* name, const Tensor& found, double limit) {
      const std::string full = fmt::format("{}.s{}", name, k);
      if (io.has(full)) report.compare(full, found, io.get(full), limit);
    };
    compare("residual_resized", quantized.residual[k], 1.5e-6);
    compare("bits", quantized.bits[k], 0);
    compare("var_input", quantized.var_input[k], 1.5e-6);
  }
  report.compare("quantized_sum", quantized.sum, io.get("quantized_sum"), 1.5e-6);

  const Tensor decoded = vae.decode(io.get("quantized_sum").to(DType::f32));
  const Tensor thin = io.get("recon_rgb_sub2").to(DType::f32);
  Tensor found = Tensor::empty(DType::f32, thin.shape());
  for (std::int64_t c = 0; c < 3; ++c)
    for (std::int64_t y = 0; y < thin.dim(2); ++y)
      for (std::int64_t x = 0; x < thin.dim(3); ++x)
        found.data<float>()[(c * thin.dim(2) + y) * thin.dim(3) + x] =
            (decoded.data<float>()[(c * decoded.dim(2) + 2 * y) * decoded.dim(3) + 2 * x] + 1) / 2;
  report.compare("recon_rgb_sub2", found, thin, 7e-5);
}

}  // namespace sparvar::conformance
