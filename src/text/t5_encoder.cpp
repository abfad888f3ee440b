#include "text/t5_encoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "sparvar/error.h"

namespace sparvar {
namespace {

/// Bidirectional buckets of T5 for key - query: exact up to a quarter of them, then logarithmic to max_distance.
int bucket_of(int distance, int buckets, int max_distance) {
  const int half = buckets / 2;
  const int exact = half / 2;
  const int offset = distance > 0 ? half : 0;
  const int length = std::abs(distance);
  if (length < exact) return offset + length;
  const float ratio = std::log(static_cast<float>(length) / static_cast<float>(exact)) /
                      static_cast<float>(std::log(static_cast<double>(max_distance) / exact)) *
                      static_cast<float>(half - exact);
  return offset + std::min(exact + static_cast<int>(ratio), half - 1);
}

Tensor position_bias(const Tensor& table, int tokens, int buckets, int max_distance) {
  const std::int64_t heads = table.dim(1);
  Tensor bias = Tensor::empty(DType::f32, {heads, tokens, tokens});
  for (int query = 0; query < tokens; ++query)
    for (int key = 0; key < tokens; ++key) {
      const float* row = table.data<float>() + bucket_of(key - query, buckets, max_distance) * heads;
      for (std::int64_t h = 0; h < heads; ++h) bias.data<float>()[(h * tokens + query) * tokens + key] = row[h];
    }
  return bias;
}

}  // namespace

T5Encoder::T5Encoder(const T5Config& config, const Weights& weights, Backend& backend)
    : config_(config), backend_(backend) {
  const std::int64_t model = config.d_model;
  const std::int64_t inner = static_cast<std::int64_t>(config.num_heads) * config.d_kv;
  const std::int64_t ffn = config.d_ff;
  const char* embedding = weights.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight";
  embedding_ = weights.get(embedding, {config.vocab_size, model});
  relative_bias_ = weights.f32("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                               {config.relative_attention_num_buckets, config.num_heads});
  final_norm_ = backend.upload(weights.f32("encoder.final_layer_norm.weight", {model}));
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = fmt::format("encoder.block.{}.layer.", i);
    const auto linear = [&](const char* name, std::int64_t out, std::int64_t in) {
      return backend.prepare_linear(weights.get(prefix + name + ".weight", {out, in}), {});
    };
    Layer layer;
    layer.attention_norm = backend.upload(weights.f32(prefix + "0.layer_norm.weight", {model}));
    layer.ffn_norm = backend.upload(weights.f32(prefix + "1.layer_norm.weight", {model}));
    layer.q = linear("0.SelfAttention.q", inner, model);
    layer.k = linear("0.SelfAttention.k", inner, model);
    layer.v = linear("0.SelfAttention.v", inner, model);
    layer.o = linear("0.SelfAttention.o", model, inner);
    layer.wi_0 = linear("1.DenseReluDense.wi_0", ffn, model);
    layer.wi_1 = linear("1.DenseReluDense.wi_1", ffn, model);
    layer.wo = linear("1.DenseReluDense.wo", model, ffn);
    layers_.push_back(std::move(layer));
  }
}

Tensor T5Encoder::embed(const std::vector<std::int32_t>& ids, std::int64_t tokens) const {
  Tensor x = Tensor::zeros(DType::f32, {tokens, config_.d_model});
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= config_.vocab_size)
      throw Error(ErrorKind::input, fmt::format("token id {} is outside the text encoder's embedding of {} rows",
                                                ids[t], config_.vocab_size));
    const Tensor row = embedding_.rows(ids[t], ids[t] + 1).to(DType::f32);
    std::copy_n(row.data<float>(), config_.d_model, x.data<float>() + static_cast<std::int64_t>(t) * config_.d_model);
  }
  return x;
}

T5Encoder::Length T5Encoder::make_length(std::int64_t tokens) {
  Length length;
  length.embedded = backend_.zeros(DType::f32, {tokens, config_.d_model});
  length.count = backend_.zeros(DType::i32, {1});
  length.bias =
      backend_.upload(position_bias(relative_bias_, static_cast<int>(tokens), config_.relative_attention_num_buckets,
                                    config_.relative_attention_max_distance));
  return length;
}

void T5Encoder::run_layer(const Layer& layer, Tensor& x, const Length& inputs) {
  const std::int64_t tokens = x.dim(0);
  const auto eps = static_cast<float>(config_.layer_norm_epsilon);
  const Shape heads = {tokens, config_.num_heads, config_.d_kv};
  const auto product = [&](const Tensor& in, const LinearPtr& weights) {
    return backend_.linear(in, *weights, Activation::none, DType::f32);
  };
  const Tensor h = backend_.rms_norm(x, layer.attention_norm, eps, backend_.compute_type());
  const Tensor read =
      backend_.biased_attention(product(h, layer.q).reshaped(heads), product(h, layer.k).reshaped(heads),
                                product(h, layer.v).reshaped(heads), inputs.bias, inputs.count);
  backend_.add_gated(x, product(read.reshaped({tokens, heads[1] * heads[2]}), layer.o), {});
  const Tensor f = backend_.rms_norm(x, layer.ffn_norm, eps, backend_.compute_type());
  backend_.add_gated(x, product(backend_.gated_gelu(product(f, layer.wi_0), product(f, layer.wi_1)), layer.wo), {});
}

Tensor T5Encoder::run_layers(const Length& inputs, const Observe& observe) {
  const auto show = [&](const char* name, int layer, const Tensor& value) {
    if (observe) observe(name, layer, backend_.download(value));
  };
  show("position_bias", 0, inputs.bias);
  Tensor x = backend_.clone(inputs.embedded);
  for (int i = 0; i < config_.num_layers; ++i) {
    show("layer_out", i, x);
    run_layer(layers_[i], x, inputs);
  }
  Tensor out = backend_.rms_norm(x, final_norm_, static_cast<float>(config_.layer_norm_epsilon), DType::f32);
  show("layer_out", config_.num_layers, out);
  return out;
}

Tensor T5Encoder::encode(const std::vector<std::int32_t>& ids, const Observe& observe) {
  const auto count = static_cast<std::int64_t>(ids.size());
  const bool recorded = backend_.records() && !observe;
  const std::int64_t step = recorded ? backend_.length_step() : 1;
  const std::int64_t tokens = (count + step - 1) / step * step;
  Length once;
  Length& length = recorded ? lengths_[tokens] : once;
  if (!length.embedded.defined()) {
    if (recorded)
      backend_.reserve([&] {
        const Length dry = make_length(tokens);
        run_layers(dry, {});
      });
    length = make_length(tokens);
    if (recorded) length.program = backend_.program([this, &length] { length.hidden = run_layers(length, {}); });
  }
  backend_.write(length.embedded, embed(ids, tokens));
  const auto present = static_cast<std::int32_t>(count);
  backend_.write(length.count, Tensor(const_cast<std::int32_t*>(&present), DType::i32, {1}, nullptr));  // NOLINT
  if (recorded)
    length.program->run();
  else
    length.hidden = run_layers(length, observe);
  const Tensor hidden = backend_.download(length.hidden);
  return hidden.dim(0) == count ? hidden : hidden.rows(0, count);
}

}  // namespace sparvar
