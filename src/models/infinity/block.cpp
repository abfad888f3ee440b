#include "models/infinity/block.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace sparvar {
namespace {

std::string block_prefix(const InfinityConfig& config, int layer) {
  if (config.block_chunks == 1) return fmt::format("blocks.{}.", layer);
  const int per_chunk = config.depth / config.block_chunks;
  return fmt::format("block_chunks.{}.module.{}.", layer / per_chunk, layer % per_chunk);
}

}  // namespace

Tensor key_value_bias(const Weights& weights, const std::string& prefix, std::int64_t width) {
  Tensor bias = Tensor::zeros(DType::f32, {2 * width});
  const Tensor v = weights.f32(prefix + ".v_bias", {width});
  std::copy_n(v.data<float>(), width, bias.data<float>() + width);
  return bias;
}

Infinity::Block::Block(const InfinityConfig& config, int layer, const Weights& weights, Backend& backend) {
  const std::int64_t width = config.embed_dim;
  const std::int64_t ffn = config.ffn_dim();
  const std::string prefix = block_prefix(config, layer);
  // Nearly all of the model's numbers: these may be narrow. The block's own modulation, where it has one, is not: it
  // scales everything and runs once a picture.
  const auto linear = [&](const std::string& name, std::int64_t out, std::int64_t in,
                          LinearKind kind = LinearKind::narrow) {
    const std::string matrix = prefix + name + ".weight";
    return backend.prepare_linear(
        kind == LinearKind::narrow ? weights.narrow(matrix, {out, in}) : weights.get(matrix, {out, in}),
        weights.get(prefix + name + ".bias", {out}), kind);
  };
  if (config.shared_aln)
    ada_gss = backend.upload(weights.f32(prefix + "ada_gss", {1, 1, 6, width}).reshaped({6, width}));
  else
    ada_lin = linear("ada_lin.1", 6 * width, width, LinearKind::plain);

  Tensor bias = Tensor::zeros(DType::f32, {3 * width});
  std::copy_n(weights.f32(prefix + "sa.q_bias", {width}).data<float>(), width, bias.data<float>());
  std::copy_n(weights.f32(prefix + "sa.v_bias", {width}).data<float>(), width, bias.data<float>() + 2 * width);
  qkv = backend.prepare_linear(weights.narrow(prefix + "sa.mat_qkv.weight", {3 * width, width}), bias,
                               LinearKind::narrow);
  if (config.cos_attn) {
    head_scale = weights.f32(prefix + "sa.scale_mul_1H11", {1, config.num_heads, 1, 1}).reshaped({config.num_heads});
    for (int h = 0; h < config.num_heads; ++h)
      head_scale.data<float>()[h] = std::exp(std::min(head_scale.data<float>()[h], std::log(100.0F)));
    head_scale = backend.upload(head_scale);
  }
  sa_proj = linear("sa.proj", width, width);

  ca_norm_weight = backend.upload(weights.f32(prefix + "ca_norm.weight", {width}));
  ca_norm_bias = backend.upload(weights.f32(prefix + "ca_norm.bias", {width}));
  ca_q = linear("ca.mat_q", width, width);
  ca_kv = backend.prepare_linear(weights.narrow(prefix + "ca.mat_kv.weight", {2 * width, width}),
                                 key_value_bias(weights, prefix + "ca", width), LinearKind::narrow);
  ca_proj = linear("ca.proj", width, width);
  if (weights.has(prefix + "ca_gamma")) {
    ca_gamma = weights.get(prefix + "ca_gamma").to(DType::f32);
    ca_gamma = ca_gamma.size() == 1 ? Tensor() : backend.upload(ca_gamma);  // a bare 1: no layer scale
  }
  fc1 = linear("ffn.fc1", ffn, width);
  fc2 = linear("ffn.fc2", width, ffn);
}

}  // namespace sparvar
