#include "pipeline/convert_config.h"

#include <fmt/format.h>

#include <charconv>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>

#include "core/open_file.h"
#include "core/resolutions.h"
#include "sparvar/error.h"
#include "weights/geometry.h"
#include "weights/strict_json.h"

namespace sparvar {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::uint64_t kMaxConfig = 1'000'000;
constexpr int kMaxDepth = 16;
constexpr int kGroups = 32;  // of GroupNorm in the released VAEs
constexpr const char* kSetHelp = "say it with --set";

/// The number behind `prefix` in "block_chunks.3.module.0.x".
std::optional<int> number_after(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  int value = 0;
  const auto [end, status] = std::from_chars(name.data(), name.data() + name.size(), value);
  if (status != std::errc{} || end == name.data() + name.size() || *end != '.') return std::nullopt;
  return value;
}

/// Indices behind a prefix; they count from 0 without a gap.
int count_after(const ConvertSource& source, const std::string& prefix) {
  std::set<int> found;
  for (const std::string& name : source.names())
    if (const std::optional<int> index = number_after(name, prefix)) found.insert(*index);
  const int count = static_cast<int>(found.size());
  if (count > 0 && *found.rbegin() != count - 1)
    source.fail(
        prefix + std::to_string(*found.rbegin()),
        fmt::format("expected the numbers from 0 to {} behind '{}', found {} of them", *found.rbegin(), prefix, count));
  return count;
}

struct Blocks {
  int depth = 0, chunks = 1;
  std::string first;  // prefix of block 0
};

Blocks find_blocks(const ConvertSource& source) {
  Blocks blocks;
  blocks.chunks = count_after(source, "block_chunks.");
  if (blocks.chunks == 0) {
    blocks.depth = count_after(source, "blocks.");
    if (blocks.depth == 0)
      source.fail("block_chunks.0.module.0.sa.mat_qkv.weight",
                  "missing; the checkpoint holds no blocks of an Infinity transformer");
    return {blocks.depth, 1, "blocks.0."};
  }
  for (int chunk = 0; chunk < blocks.chunks; ++chunk) {
    const std::string prefix = fmt::format("block_chunks.{}.module.", chunk);
    const int each = count_after(source, prefix);
    if (chunk > 0 && each * chunk != blocks.depth)
      source.fail(prefix,
                  fmt::format("expected {} blocks as in the chunks before, found {}", blocks.depth / chunk, each));
    blocks.depth += each;
  }
  blocks.first = "block_chunks.0.module.0.";
  return blocks;
}

/// Heads where no tensor tells them: those of the released model of this width.
int released_heads(const ConvertSource& source, std::int64_t width) {
  for (const std::string& name : geometry_names()) {
    const InfinityConfig known = geometry(name).transformer;
    if (known.embed_dim == width) return known.num_heads;
  }
  source.fail("sa.scale_mul_1H11", fmt::format("missing, and no released model is {} wide: the number of heads is not "
                                               "known, {} transformer.num_heads=N",
                                               width, kSetHelp));
}

/// The FFN's width is round(ratio * C / 256) * 256: the released models' 4, else what gives the width.
double mlp_ratio(std::int64_t ffn, std::int64_t width) {
  InfinityConfig config;
  config.embed_dim = static_cast<int>(width);
  if (config.ffn_dim() == ffn) return config.mlp_ratio;
  return static_cast<double>(ffn) / static_cast<double>(width);
}

Json transformer_config(const ConvertSource& source, std::int64_t codebook_dim) {
  const Blocks blocks = find_blocks(source);
  const Shape embedding = source.shape("word_embed.weight", 2);
  const std::int64_t width = embedding[0];
  const std::int64_t bits = embedding[1];
  if (bits != codebook_dim && bits != 4 * codebook_dim)
    source.fail("word_embed.weight",
                fmt::format("words of {} bits fit no VAE of {} bits: expected {}, or {} with 2x2 patches", bits,
                            codebook_dim, codebook_dim, 4 * codebook_dim));
  for (const char* part : {"ffn.fcg.weight", "ffn.fc1.1.weight"})
    if (source.has(blocks.first + part)) source.fail(blocks.first + part, "a gated FFN (swiglu) is not supported");
  const std::string heads = blocks.first + "sa.scale_mul_1H11";
  const bool cosine = source.has(heads);
  const Shape uncond = source.shape("cfg_uncond", 2);
  Json json;
  json["depth"] = blocks.depth;
  json["embed_dim"] = width;
  json["num_heads"] = cosine ? source.shape(heads, 4)[1] : released_heads(source, width);
  json["block_chunks"] = blocks.chunks;
  json["mlp_ratio"] = mlp_ratio(source.shape(blocks.first + "ffn.fc1.weight", 2)[0], width);
  json["text_channels"] = uncond[1];
  json["text_maxlen"] = uncond[0];
  json["codebook_dim"] = codebook_dim;
  json["apply_spatial_patchify"] = bits != codebook_dim;
  json["rope2d_normalized_by_hw"] = 2;
  json["add_lvl_embeding_only_first_block"] = true;
  json["cos_attn"] = cosine;
  json["shared_aln"] = source.has("shared_ada_lin.1.weight");
  json["nm0"] = source.has("norm0_ve.weight");
  json["norm_eps"] = 1e-6;
  return json;
}

Json vae_config(const ConvertSource& source) {
  const int levels = count_after(source, "decoder.up.");
  const std::int64_t bits = source.shape("decoder.conv_in.conv.weight", 4)[1];
  std::vector<std::int64_t> widths;
  for (int level = 0; level < levels; ++level)
    widths.push_back(source.shape(fmt::format("decoder.up.{}.block.0.conv1.conv.weight", level), 4)[0]);
  if (widths.empty()) source.fail("decoder.up.0.block.0.conv1.conv.weight", "missing; the decoder has no levels");
  for (const std::string& name : source.names())
    if (name.starts_with("decoder.") && name.find(".attn") != std::string::npos)
      source.fail(name, "a VAE with attention is not supported: the released BSQ-VAEs have none");
  // The encoder says the base width; without it the finest level is that, as in the released models, if it can be.
  std::int64_t base = widths[0];
  if (source.has("encoder.conv_in.conv.weight")) base = source.shape("encoder.conv_in.conv.weight", 4)[0];
  for (const std::int64_t width : widths) base = std::gcd(base, width);
  if (base == 0) source.fail("decoder.conv_in.conv.weight", "has no channels");
  Json multipliers = Json::array();
  for (const std::int64_t width : widths) multipliers.push_back(width / base);
  Json json;
  json["codebook_dim"] = bits;
  json["patch_size"] = 1 << (std::min(levels, 16) - 1);
  json["ch"] = base;
  json["ch_mult"] = multipliers;
  json["num_res_blocks"] = count_after(source, "decoder.up.0.block.") - 1;
  json["norm_num_groups"] = kGroups;
  json["norm_eps"] = 1e-6;
  return json;
}

/// What the engine reads of T5Config; all else says how it was trained.
Json text_config_of(const std::string& path) {
  const nlohmann::json given = parse_json(read_text(path, kMaxConfig), path, kMaxDepth);
  if (!given.is_object()) throw Error(ErrorKind::input, path + ": expected an object, found " + describe(given));
  if (const auto type = given.find("model_type"); type != given.end() && *type != "t5" && *type != "mt5")
    throw Error(ErrorKind::input, fmt::format("{}: model_type: expected \"t5\", found {}", path, describe(*type)));
  Json json;
  json["type"] = "t5";
  for (const char* key : {"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
                          "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"})
    if (const auto found = given.find(key); found != given.end()) json[key] = *found;
  // Without the key it is the T5 of 2019, whose FFN is another.
  json["feed_forward_proj"] = given.value("feed_forward_proj", nlohmann::json("relu"));
  return json;
}

/// "transformer.num_heads=16" into the config.
void apply(Json& config, const std::string& assignment) {
  const std::size_t equals = assignment.find('=');
  const auto fail = [&](const char* why) {
    throw Error(ErrorKind::usage, fmt::format("--set '{}': {}", assignment, why));
  };
  if (equals == std::string::npos || equals == 0) fail("expected KEY=VALUE, as in transformer.num_heads=16");
  std::string_view key = std::string_view(assignment).substr(0, equals);
  const std::string value = assignment.substr(equals + 1);
  Json* target = &config;
  for (std::size_t dot = key.find('.'); dot != std::string_view::npos; dot = key.find('.')) {
    const std::string part(key.substr(0, dot));
    if (!target->contains(part) || !(*target)[part].is_object())
      fail("config.json has no such part (docs/model-format.md)");
    target = &(*target)[part];
    key.remove_prefix(dot + 1);
  }
  const Json parsed = Json::parse(value, nullptr, false);
  (*target)[std::string(key)] = parsed.is_discarded() ? Json(value) : parsed;
}

}  // namespace

Json derive_config(const ConvertSource& transformer, const ConvertSource& vae, const std::string& text_config,
                   const std::vector<std::string>& set) {
  Json config;
  config["architecture"] = "infinity";
  config["vae"] = vae_config(vae);
  config["transformer"] = transformer_config(transformer, config["vae"]["codebook_dim"].get<std::int64_t>());
  config["text_encoder"] = text_config_of(text_config);
  // Upstream's default: a square of 1M pixels, guidance 4.
  Json scales = Json::array();
  for (const Grid& grid : *schedule_1m(1.0)) scales.push_back(grid.h);
  config["scales"] = scales;
  config["defaults"] = {{"cfg", 4}, {"tau", 1}};
  for (const std::string& assignment : set) apply(config, assignment);
  return config;
}

}  // namespace sparvar
