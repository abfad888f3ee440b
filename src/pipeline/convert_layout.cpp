// The same tensors as in models/infinity, visual/bsq_vae.cpp and text/t5_encoder.cpp; a test compares the lists.
#include "pipeline/convert_layout.h"

#include <fmt/format.h>

namespace sparvar {
namespace {

class Layout {
 public:
  explicit Layout(const ConvertSource& source) : source_(source) {}

  void add(const std::string& name, const Shape& shape) {
    const Shape found = source_.shape(name);
    if (found != shape)
      source_.fail(name, fmt::format("expected shape {}, found {}", to_string(shape), to_string(found)));
    tensors_.push_back({name, shape});
  }
  void linear(const std::string& name, std::int64_t out, std::int64_t in) {
    add(name + ".weight", {out, in});
    add(name + ".bias", {out});
  }
  void convolution(const std::string& name, std::int64_t in, std::int64_t out, std::int64_t kernel = 3) {
    add(name + ".conv.weight", {out, in, kernel, kernel});
    add(name + ".conv.bias", {out});
  }
  void group_norm(const std::string& name, std::int64_t channels) {
    add(name + ".norm.weight", {channels});
    add(name + ".norm.bias", {channels});
  }
  void residual_block(const std::string& name, std::int64_t in, std::int64_t out) {
    group_norm(name + ".norm1", in);
    convolution(name + ".conv1", in, out);
    group_norm(name + ".norm2", out);
    convolution(name + ".conv2", out, out);
    if (in != out) convolution(name + ".nin_shortcut", in, out, 1);
  }
  void residual_blocks(const std::string& name, int count, std::int64_t in, std::int64_t out) {
    for (int i = 0; i < count; ++i) residual_block(fmt::format("{}.block.{}", name, i), i == 0 ? in : out, out);
  }
  const ConvertSource& source() const { return source_; }
  std::vector<WantedTensor> take() { return std::move(tensors_); }

 private:
  const ConvertSource& source_;
  std::vector<WantedTensor> tensors_;
};

void add_block(Layout& layout, const InfinityConfig& config, const std::string& prefix) {
  const std::int64_t width = config.embed_dim;
  if (config.shared_aln)
    layout.add(prefix + "ada_gss", {1, 1, 6, width});
  else
    layout.linear(prefix + "ada_lin.1", 6 * width, width);
  layout.add(prefix + "sa.mat_qkv.weight", {3 * width, width});
  layout.add(prefix + "sa.q_bias", {width});
  layout.add(prefix + "sa.v_bias", {width});
  if (config.cos_attn) layout.add(prefix + "sa.scale_mul_1H11", {1, config.num_heads, 1, 1});
  layout.linear(prefix + "sa.proj", width, width);
  layout.add(prefix + "ca_norm.weight", {width});
  layout.add(prefix + "ca_norm.bias", {width});
  layout.linear(prefix + "ca.mat_q", width, width);
  layout.add(prefix + "ca.mat_kv.weight", {2 * width, width});
  layout.add(prefix + "ca.v_bias", {width});
  layout.linear(prefix + "ca.proj", width, width);
  if (const std::string gamma = prefix + "ca_gamma"; layout.source().has(gamma)) {
    const Shape found = layout.source().shape(gamma);
    std::int64_t elements = 1;
    for (const std::int64_t extent : found) elements *= extent;
    if (elements != 1 && elements != width)
      layout.source().fail(gamma, fmt::format("expected 1 or {} elements, found {}", width, to_string(found)));
    layout.add(gamma, found);
  }
  layout.linear(prefix + "ffn.fc1", config.ffn_dim(), width);
  layout.linear(prefix + "ffn.fc2", width, config.ffn_dim());
}

}  // namespace

std::vector<WantedTensor> transformer_layout(const InfinityConfig& config, std::size_t scales,
                                             const ConvertSource& source) {
  Layout layout(source);
  const std::int64_t width = config.embed_dim;
  const std::int64_t text = config.text_channels;
  const std::int64_t heads = text / 128;  // of the text pool
  layout.add("cfg_uncond", {config.text_maxlen, text});
  layout.add("text_norm.weight", {text});
  layout.add("text_proj_for_sos.ca.mat_q", {1, heads, heads > 0 ? width / heads : 0});
  layout.add("text_proj_for_sos.ca.mat_kv.weight", {2 * width, text});
  layout.add("text_proj_for_sos.ca.v_bias", {width});
  layout.linear("text_proj_for_sos.ca.proj", width, width);
  layout.linear("text_proj_for_ca.0", width, text);
  layout.linear("text_proj_for_ca.2", width, width);
  layout.add("pos_start", {1, 1, width});
  const Shape levels = source.shape("lvl_embed.weight", 2);
  if (levels[0] < static_cast<std::int64_t>(scales))
    source.fail("lvl_embed.weight",
                fmt::format("embeddings of {} scales, expected {} (scales in config.json; say others "
                            "with --set scales=[...])",
                            levels[0], scales));
  layout.add("lvl_embed.weight", {levels[0], width});
  if (config.nm0) {
    layout.add("norm0_ve.weight", {config.bits()});
    layout.add("norm0_ve.bias", {config.bits()});
  }
  layout.linear("word_embed", width, config.bits());
  if (config.shared_aln) layout.linear("shared_ada_lin.1", 6 * width, width);
  layout.linear("head_nm.ada_lin.1", 2 * width, width);
  layout.linear("head", 2L * config.bits(), width);
  const int each = config.depth / config.block_chunks;
  for (int i = 0; i < config.depth; ++i)
    add_block(layout, config,
              config.block_chunks == 1 ? fmt::format("blocks.{}.", i)
                                       : fmt::format("block_chunks.{}.module.{}.", i / each, i % each));
  return layout.take();
}

std::vector<WantedTensor> vae_layout(const VaeConfig& config, const ConvertSource& source) {
  Layout layout(source);
  const int levels = static_cast<int>(config.ch_mult.size());
  const auto channels = [&](int level) {
    return static_cast<std::int64_t>(config.ch) * config.ch_mult[static_cast<std::size_t>(level)];
  };
  std::int64_t width = channels(levels - 1);
  layout.convolution("decoder.conv_in", config.codebook_dim, width);
  layout.residual_block("decoder.mid.block_1", width, width);
  layout.residual_block("decoder.mid.block_2", width, width);
  for (int i = levels - 1; i >= 0; --i) {
    const std::string name = fmt::format("decoder.up.{}", i);
    layout.residual_blocks(name, config.num_res_blocks + 1, width, channels(i));
    width = channels(i);
    if (i >= 1) layout.convolution(name + ".upsample.conv", width, width);
  }
  layout.group_norm("decoder.norm_out", width);
  layout.convolution("decoder.conv_out", width, 3);
  if (!source.has("encoder.conv_in.conv.weight")) return layout.take();
  width = config.ch;
  layout.convolution("encoder.conv_in", 3, width);
  for (int i = 0; i < levels; ++i) {
    const std::string name = fmt::format("encoder.down.{}", i);
    layout.residual_blocks(name, config.num_res_blocks, width, channels(i));
    width = channels(i);
    if (i + 1 < levels) layout.convolution(name + ".downsample.conv", width, width);
  }
  layout.residual_block("encoder.mid.block_1", width, width);
  layout.residual_block("encoder.mid.block_2", width, width);
  layout.group_norm("encoder.norm_out", width);
  layout.convolution("encoder.conv_out", width, config.codebook_dim);
  return layout.take();
}

std::vector<WantedTensor> text_layout(const T5Config& config, const ConvertSource& source) {
  Layout layout(source);
  const std::int64_t model = config.d_model;
  const std::int64_t inner = static_cast<std::int64_t>(config.num_heads) * config.d_kv;
  layout.add(source.has("shared.weight") || !source.has("encoder.embed_tokens.weight") ? "shared.weight"
                                                                                       : "encoder.embed_tokens.weight",
             {config.vocab_size, model});
  layout.add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
             {config.relative_attention_num_buckets, config.num_heads});
  layout.add("encoder.final_layer_norm.weight", {model});
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = fmt::format("encoder.block.{}.layer.", i);
    layout.add(prefix + "0.layer_norm.weight", {model});
    layout.add(prefix + "1.layer_norm.weight", {model});
    for (const char* name : {"q", "k", "v"})
      layout.add(fmt::format("{}0.SelfAttention.{}.weight", prefix, name), {inner, model});
    layout.add(prefix + "0.SelfAttention.o.weight", {model, inner});
    layout.add(prefix + "1.DenseReluDense.wi_0.weight", {config.d_ff, model});
    layout.add(prefix + "1.DenseReluDense.wi_1.weight", {config.d_ff, model});
    layout.add(prefix + "1.DenseReluDense.wo.weight", {model, config.d_ff});
  }
  return layout.take();
}

}  // namespace sparvar
