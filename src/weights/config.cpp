#include "weights/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/open_file.h"
#include "core/resolutions.h"
#include "sparvar/error.h"
#include "weights/fields.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

constexpr std::uint64_t kMaxFile = 1'000'000;
constexpr int kMaxDepth = 16;
constexpr std::size_t kMaxScales = 64;
constexpr int kMaxSide = 512;       // tokens
constexpr int kMaxPixels = 16'384;  // a side of the picture
constexpr int kMaxWidth = 16'384;   // channels; with the ranges below no product leaves 63 bits

int text_pool_heads(const InfinityConfig& config) {
  return config.text_channels / (config.embed_dim > 4096 ? 64 : 128);
}

std::vector<int> read_guidance_layers(const Fields& fields, int depth) {
  const std::string key = "cfg_insertion_layer";
  if (!fields.has(key)) return {0};
  if (!fields.at(key).is_array()) return {fields.integer(key, 1 - depth, 0)};
  return fields.integers(key, 1, static_cast<std::size_t>(depth), 1 - depth, 0);
}

void check_transformer(const Fields& fields, const InfinityConfig& config) {
  if (config.depth % config.block_chunks != 0)
    fields.fail("block_chunks",
                fmt::format("expected a divisor of depth {}, found {}", config.depth, config.block_chunks));
  if (config.embed_dim % config.num_heads != 0)
    fields.fail("num_heads",
                fmt::format("expected a divisor of embed_dim {}, found {}", config.embed_dim, config.num_heads));
  if (config.head_dim() % 4 != 0 || config.head_dim() > 256)
    fields.fail("num_heads",
                fmt::format("expected a head dim (embed_dim / num_heads) that is a multiple of 4 up to 256, found {}",
                            config.head_dim()));
  if (config.ffn_dim() < 256)
    fields.fail("mlp_ratio",
                fmt::format("expected round(mlp_ratio * embed_dim / 256) of at least 1, found {:g} * {} / 256",
                            config.mlp_ratio, config.embed_dim));
  const int heads = text_pool_heads(config);
  if (heads == 0 || config.embed_dim % heads != 0)
    fields.fail("text_channels",
                fmt::format("{} channels give the text pool {} heads, expected a divisor of embed_dim {}",
                            config.text_channels, heads, config.embed_dim));
}

InfinityConfig read_transformer(const nlohmann::json& value, const std::string& where) {
  const Fields fields(value, where, "transformer",
                      {"depth",
                       "embed_dim",
                       "num_heads",
                       "block_chunks",
                       "mlp_ratio",
                       "text_channels",
                       "text_maxlen",
                       "codebook_dim",
                       "apply_spatial_patchify",
                       "rope2d_normalized_by_hw",
                       "rope2d_each_sa_layer",
                       "add_lvl_embeding_only_first_block",
                       "cos_attn",
                       "shared_aln",
                       "nm0",
                       "norm_eps",
                       "rope_base",
                       "cfg_insertion_layer",
                       "swiglu",
                       "rms_norm",
                       "head_aln",
                       "use_bit_label"});
  InfinityConfig config;
  config.depth = fields.integer("depth", 1, 256);
  config.embed_dim = fields.integer("embed_dim", 4, kMaxWidth);
  config.num_heads = fields.integer("num_heads", 1, 1024);
  config.block_chunks = fields.integer("block_chunks", 1, 256, config.block_chunks);
  config.mlp_ratio = fields.number("mlp_ratio", 0.01, 16, config.mlp_ratio);
  config.text_channels = fields.integer("text_channels", 1, kMaxWidth);
  config.text_maxlen = fields.integer("text_maxlen", 1, 4096, config.text_maxlen);
  config.codebook_dim = fields.integer("codebook_dim", 1, 64);
  config.apply_spatial_patchify = fields.boolean("apply_spatial_patchify", config.apply_spatial_patchify);
  config.rope2d_normalized_by_hw = fields.integer("rope2d_normalized_by_hw", 0, 2, config.rope2d_normalized_by_hw);
  config.add_lvl_embeding_only_first_block =
      fields.boolean("add_lvl_embeding_only_first_block", config.add_lvl_embeding_only_first_block);
  config.cos_attn = fields.boolean("cos_attn", config.cos_attn);
  config.shared_aln = fields.boolean("shared_aln", config.shared_aln);
  config.nm0 = fields.boolean("nm0", config.nm0);
  config.norm_eps = fields.number("norm_eps", 1e-12, 0.1, config.norm_eps);
  config.rope_base = fields.number("rope_base", 1, 1e9, config.rope_base);
  config.cfg_insertion_layer = read_guidance_layers(fields, config.depth);
  fields.only("rope2d_each_sa_layer", true);  // upstream has no other form
  fields.only("swiglu", false);
  fields.only("rms_norm", false);
  fields.only("head_aln", true);
  fields.only("use_bit_label", true);
  check_transformer(fields, config);
  return config;
}

VaeConfig read_vae(const nlohmann::json& value, const std::string& where, const InfinityConfig& transformer) {
  const Fields fields(
      value, where, "vae",
      {"codebook_dim", "patch_size", "ch", "ch_mult", "num_res_blocks", "norm_num_groups", "norm_eps", "attention"});
  VaeConfig config;
  config.codebook_dim = fields.integer("codebook_dim", 1, 64);
  config.ch = fields.integer("ch", 1, 4096, config.ch);
  config.ch_mult = fields.integers("ch_mult", 1, 6, 1, 64);
  config.patch_size = fields.integer("patch_size", 1, 32, config.patch_size);
  config.num_res_blocks = fields.integer("num_res_blocks", 1, 16, config.num_res_blocks);
  config.norm_num_groups = fields.integer("norm_num_groups", 1, 4096, config.norm_num_groups);
  config.norm_eps = fields.number("norm_eps", 1e-12, 0.1, config.norm_eps);
  fields.only("attention", false);  // the released BSQ-VAEs have none
  if (config.codebook_dim != transformer.codebook_dim)
    fields.fail("codebook_dim", fmt::format("expected transformer.codebook_dim {}, found {}", transformer.codebook_dim,
                                            config.codebook_dim));
  if (const int stride = 1 << (config.ch_mult.size() - 1); config.patch_size != stride)
    fields.fail("patch_size", fmt::format("expected {}, as ch_mult has {} levels, found {}", stride,
                                          config.ch_mult.size(), config.patch_size));
  for (const int mult : config.ch_mult) {
    const int channels = config.ch * mult;
    if (channels > kMaxWidth)
      fields.fail("ch_mult", fmt::format("expected at most {} channels, found {} * {}", kMaxWidth, config.ch, mult));
    if (channels % config.norm_num_groups != 0)
      fields.fail("norm_num_groups",
                  fmt::format("expected a divisor of ch * ch_mult = {}, found {}", channels, config.norm_num_groups));
  }
  return config;
}

T5Config read_text_encoder(const nlohmann::json& value, const std::string& where, const InfinityConfig& transformer) {
  const Fields fields(
      value, where, "text_encoder",
      {"type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
       "relative_attention_max_distance", "feed_forward_proj", "layer_norm_epsilon"});
  T5Config config;
  fields.only_text("type", "t5");
  fields.only_text("feed_forward_proj", "gated-gelu");
  config.vocab_size = fields.integer("vocab_size", 3, 4'000'000);
  config.d_model = fields.integer("d_model", 1, kMaxWidth);
  config.d_kv = fields.integer("d_kv", 1, 512, config.d_kv);
  config.d_ff = fields.integer("d_ff", 1, 4 * kMaxWidth);
  config.num_layers = fields.integer("num_layers", 1, 256);
  config.num_heads = fields.integer("num_heads", 1, 1024);
  config.relative_attention_num_buckets =
      fields.integer("relative_attention_num_buckets", 4, 1024, config.relative_attention_num_buckets);
  config.relative_attention_max_distance =
      fields.integer("relative_attention_max_distance", 2, 1 << 20, config.relative_attention_max_distance);
  config.layer_norm_epsilon = fields.number("layer_norm_epsilon", 1e-12, 0.1, config.layer_norm_epsilon);
  if (config.d_model != transformer.text_channels)
    fields.fail("d_model", fmt::format("expected transformer.text_channels {}, found {}", transformer.text_channels,
                                       config.d_model));
  if (const int inner = config.num_heads * config.d_kv; inner > 4 * kMaxWidth)
    fields.fail("d_kv", fmt::format("expected num_heads * d_kv of at most {}, found {}", 4 * kMaxWidth, inner));
  // Half of the buckets are for keys ahead; of each half, one half is a bucket a distance and the rest is logarithmic.
  if (config.relative_attention_num_buckets % 4 != 0)
    fields.fail("relative_attention_num_buckets",
                fmt::format("expected a multiple of 4, found {}", config.relative_attention_num_buckets));
  if (const int exact = config.relative_attention_num_buckets / 4; config.relative_attention_max_distance <= exact)
    fields.fail("relative_attention_max_distance",
                fmt::format("expected more than relative_attention_num_buckets / 4 = {}, found {}", exact,
                            config.relative_attention_max_distance));
  return config;
}

/// A side of a square grid, or [h, w].
Grid read_grid(const Fields& fields, const std::string& key, const nlohmann::json& value) {
  const auto side = [](const nlohmann::json& n) { return as_integer(n, 1, kMaxSide); };
  if (const std::optional<int> n = side(value)) return {*n, *n};
  if (value.is_array() && value.size() == 2 && side(value[0]) && side(value[1]))
    return {*side(value[0]), *side(value[1])};
  fields.fail(key, fmt::format("expected n or [h, w] with sides from 1 to {}, found {}", kMaxSide, describe(value)));
}

ScaleSchedule read_schedule(const Fields& fields) {
  const nlohmann::json& value = fields.at("scales");
  if (!value.is_array() || value.empty() || value.size() > kMaxScales)
    fields.fail("scales", fmt::format("expected a list of 1 to {} scales, found {}", kMaxScales, describe(value)));
  ScaleSchedule schedule;
  for (const nlohmann::json& item : value) {
    const Grid grid = read_grid(fields, "scales", item);
    if (schedule.empty() && grid != Grid{1, 1})
      fields.fail("scales", fmt::format("expected 1x1 first, found {}x{}", grid.h, grid.w));
    if (!schedule.empty() && (grid.h < schedule.back().h || grid.w < schedule.back().w))
      fields.fail("scales", fmt::format("expected scales that do not shrink, found {}x{} after {}x{}", grid.h, grid.w,
                                        schedule.back().h, schedule.back().w));
    schedule.push_back(grid);
  }
  return schedule;
}

void check_picture(const Fields& fields, const ModelConfig& config) {
  const int pixels = config.vae.patch_size * (config.transformer.apply_spatial_patchify ? 2 : 1);
  const Grid last = config.schedule.back();
  if (std::max(last.h, last.w) * pixels > kMaxPixels)
    fields.fail("scales", fmt::format("expected pictures of at most {} pixels a side, found {}x{}", kMaxPixels,
                                      last.h * pixels, last.w * pixels));
}

}  // namespace

int InfinityConfig::ffn_dim() const {
  // Rounds half to even, as Python's round() does.
  return static_cast<int>(std::nearbyint(mlp_ratio * embed_dim / 256)) * 256;
}

ModelConfig parse_model_config(const std::string& text, const std::string& where) {
  if (text.size() > kMaxFile)
    throw Error(ErrorKind::input, fmt::format("{}: {} bytes long, expected at most {}", where, text.size(), kMaxFile));
  const nlohmann::json json = parse_json(text, where, kMaxDepth);
  const Fields fields(json, where, "",
                      {"architecture", "transformer", "vae", "text_encoder", "scales", "defaults", "rope_grid"});
  ModelConfig config;
  config.architecture = fields.text("architecture");
  fields.only_text("architecture", "infinity");
  config.transformer = read_transformer(fields.at("transformer"), where);
  config.vae = read_vae(fields.at("vae"), where, config.transformer);
  config.text_encoder = read_text_encoder(fields.at("text_encoder"), where, config.transformer);
  config.schedule = read_schedule(fields);
  check_picture(fields, config);
  config.rope_grid = fields.has("rope_grid") ? read_grid(fields, "rope_grid", fields.at("rope_grid"))
                                             : rope_grid_of(config.schedule).value_or(config.schedule.back());
  const nlohmann::json none = nlohmann::json::object();
  const Fields defaults(fields.has("defaults") ? fields.at("defaults") : none, where, "defaults", {"cfg", "tau"});
  config.default_cfg = defaults.numbers("cfg", config.schedule.size(), 0, 1000, 3.0F);
  config.default_tau = defaults.numbers("tau", config.schedule.size(), 1e-3, 1000, 1.0F);
  return config;
}

ModelConfig read_model_config(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) {
    const std::string folder = std::filesystem::path(path).parent_path().string();
    throw Error(ErrorKind::input, fmt::format("{}: no such file; '{}' is not a model folder, which holds config.json, "
                                              "*.safetensors and spiece.model",
                                              path, folder.empty() ? "." : folder));
  }
  return parse_model_config(read_text(path, kMaxFile), path);
}

}  // namespace sparvar
