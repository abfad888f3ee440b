#include "models/infinity/infinity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "models/infinity/block.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

/// f32 [rows, parts, C] -> `parts` tensors [rows, C].
std::vector<Tensor> split(const Tensor& x, int parts, std::int64_t width) {
  const std::int64_t rows = x.size() / (parts * width);
  std::vector<Tensor> out;
  for (int p = 0; p < parts; ++p) {
    Tensor part = Tensor::empty(DType::f32, {rows, width});
    for (std::int64_t r = 0; r < rows; ++r)
      std::copy_n(x.data<float>() + (r * parts + p) * width, width, part.data<float>() + r * width);
    out.push_back(std::move(part));
  }
  return out;
}

/// Adds y to every y.size() elements of x.
void add_repeated(Tensor& x, const Tensor& y) {
  const std::int64_t period = y.size();
  for (float* row = x.data<float>(); row != x.data<float>() + x.size(); row += period)
    for (std::int64_t i = 0; i < period; ++i) row[i] += y.data<float>()[i];
}

}  // namespace

Infinity::Infinity(const InfinityConfig& config, const TensorFile& weights, Backend& backend)
    : config_(config), backend_(backend), parameters_(weights.parameters()) {
  const std::int64_t width = config.embed_dim;
  const std::int64_t text = config.text_channels;
  const int bits = config.bits();
  // All of these are small beside the blocks, and every bit hangs on the last: they multiply in f32.
  const auto linear = [&](const std::string& name, std::int64_t out, std::int64_t in) {
    return backend.prepare_linear(weights.get(name + ".weight", {out, in}), weights.get(name + ".bias", {out}), true);
  };
  const int pool_heads = static_cast<int>(text) / 128;  // upstream TextAttentivePool: 128 text channels a head
  if (pool_heads < 1 || width % pool_heads != 0)
    throw Error(ErrorKind::input,
                fmt::format("{}: text_channels {} make {} pooling heads, which do not divide embed_dim {}",
                            weights.path(), text, pool_heads, width));
  cfg_uncond_ = weights.get("cfg_uncond").to(DType::f32);
  if (cfg_uncond_.rank() != 2 || cfg_uncond_.dim(1) != text)
    throw Error(ErrorKind::input, fmt::format("{}: tensor cfg_uncond: expected [text_maxlen, {}], found {}",
                                              weights.path(), text, to_string(cfg_uncond_.shape())));
  text_norm_ = weights.f32("text_norm.weight", {text});
  pool_query_ = weights.f32("text_proj_for_sos.ca.mat_q", {1, pool_heads, width / pool_heads});
  pool_kv_ = backend.prepare_linear(weights.get("text_proj_for_sos.ca.mat_kv.weight", {2 * width, text}),
                                    key_value_bias(weights, "text_proj_for_sos.ca", width), true);
  pool_proj_ = linear("text_proj_for_sos.ca.proj", width, width);
  text_proj_0_ = linear("text_proj_for_ca.0", width, text);
  text_proj_2_ = linear("text_proj_for_ca.2", width, width);
  pos_start_ = weights.f32("pos_start", {1, 1, width});
  lvl_embed_ = weights.get("lvl_embed.weight").to(DType::f32);
  if (lvl_embed_.rank() != 2 || lvl_embed_.dim(1) != width)
    throw Error(ErrorKind::input, fmt::format("{}: tensor lvl_embed.weight: expected [levels, {}], found {}",
                                              weights.path(), width, to_string(lvl_embed_.shape())));
  if (config.nm0) {
    norm0_weight_ = weights.f32("norm0_ve.weight", {bits});
    norm0_bias_ = weights.f32("norm0_ve.bias", {bits});
  }
  word_embed_ = linear("word_embed", width, bits);
  if (config.shared_aln) shared_ada_ = linear("shared_ada_lin.1", 6 * width, width);
  head_ada_ = linear("head_nm.ada_lin.1", 2 * width, width);
  head_ = linear("head", 2L * bits, width);
  for (int layer = 0; layer < config.depth; ++layer)
    blocks_.push_back(std::make_shared<Block>(config, layer, weights, backend));
}

Infinity::State Infinity::begin(const PackedText& text, bool guided, const ScaleSchedule& schedule, Grid rope_grid,
                                const AttentionPlan& plan, const Observer& observe) {
  State state(backend_, plan, schedule, config_.depth);
  if (static_cast<std::int64_t>(schedule.size()) > lvl_embed_.dim(0))
    throw Error(ErrorKind::usage, fmt::format("{} scales, but the model has level embeddings for {}", schedule.size(),
                                              lvl_embed_.dim(0)));
  state.rope_grid_ = rope_grid;
  state.pictures_ = text.count();
  state.rows_ = text.count() * (guided ? 2 : 1);

  // The unconditional half of each text: as many learned states as the text has tokens.
  const std::int64_t channels = config_.text_channels;
  const std::int64_t total = text.offsets.back();
  Tensor packed = Tensor::empty(DType::f32, {guided ? 2 * total : total, channels});
  std::copy_n(text.states.data<float>(), total * channels, packed.data<float>());
  state.text_offsets_ = text.offsets;
  for (int i = 0; guided && i < text.count(); ++i) {
    const int length = text.offsets[i + 1] - text.offsets[i];
    if (length > cfg_uncond_.dim(0))
      throw Error(ErrorKind::usage, fmt::format("a prompt of {} tokens: the model takes at most {} (text_maxlen)",
                                                length, cfg_uncond_.dim(0)));
    std::copy_n(cfg_uncond_.data<float>(), length * channels,
                packed.data<float>() + (total + text.offsets[i]) * channels);
    state.text_offsets_.push_back(static_cast<int>(total) + text.offsets[i + 1]);
  }

  const Tensor normed = backend_.rms_norm(packed, text_norm_, static_cast<float>(config_.norm_eps), DType::f32);
  if (observe) observe("text_normed", normed);

  // Attentive pool: one learned query a head, attending to the whole text.
  const std::int64_t heads = pool_query_.dim(1);
  const std::int64_t head_dim = pool_query_.dim(2);
  Tensor query = Tensor::empty(DType::f32, {state.rows_, 1, heads, head_dim});
  for (std::int64_t r = 0; r < state.rows_; ++r)
    std::copy_n(pool_query_.data<float>(), pool_query_.size(), query.data<float>() + r * pool_query_.size());
  const DType compute = backend_.compute_type();
  const Tensor pool_kv =
      backend_.linear(normed, *pool_kv_, Activation::none, DType::f32).reshaped({packed.dim(0), 2, heads, head_dim});
  const Tensor pooled =
      backend_.cross_attention(query, pool_kv, state.text_offsets_, 1.0F / std::sqrt(static_cast<float>(head_dim)));
  state.condition_ =
      backend_.linear(pooled.reshaped({state.rows_, config_.embed_dim}), *pool_proj_, Activation::none, DType::f32);
  if (observe) observe("cond_BD", state.condition_);

  const Tensor hidden = backend_.linear(normed, *text_proj_0_, Activation::gelu_tanh, DType::f32);
  const Tensor text_kv = backend_.linear(hidden, *text_proj_2_, Activation::none, DType::f32);
  if (observe) observe("ca_kv", text_kv);

  const Tensor condition = backend_.apply(state.condition_, Activation::silu);
  Tensor shared;
  if (shared_ada_) {
    shared = backend_.linear(condition, *shared_ada_, Activation::none, DType::f32);
    if (observe) observe("cond_gss", shared);
  }
  for (const auto& block : blocks_) {
    Tensor ada = block->ada_lin ? backend_.linear(condition, *block->ada_lin, Activation::none, DType::f32)
                                : shared.to(DType::f32);
    if (!block->ada_lin) add_repeated(ada, block->ada_gss);
    state.ada_.push_back(split(ada, 6, config_.embed_dim));
    state.text_kv_.push_back(backend_.linear(text_kv, *block->ca_kv, Activation::none, compute)
                                 .reshaped({packed.dim(0), 2, config_.num_heads, config_.head_dim()}));
  }
  const auto head_ada =
      split(backend_.linear(condition, *head_ada_, Activation::none, DType::f32), 2, config_.embed_dim);
  state.head_scale_ = head_ada[0];
  state.head_shift_ = head_ada[1];

  int cached = 0;  // the last scale's keys are never kept past their layer
  for (std::size_t k = 0; k + 1 < schedule.size(); ++k) cached += schedule[k].tokens();
  for (int layer = 0; layer < config_.depth; ++layer) {
    const Shape shape = {state.rows_, config_.num_heads, cached, config_.head_dim()};
    state.k_cache_.push_back(Tensor::empty(compute, shape));
    state.v_cache_.push_back(Tensor::empty(compute, shape));
  }
  return state;
}

Tensor Infinity::embed(State& state, const Tensor& words, const Observer& observe) {
  const std::int64_t width = config_.embed_dim;
  const int n = state.schedule_[state.scale_].tokens();
  if (state.scale_ == 0) {
    Tensor x = state.condition_.to(DType::f32).reshaped({state.rows_, 1, width});
    add_repeated(x, pos_start_);
    return x;
  }
  if (words.shape() != Shape{state.pictures_, n, config_.bits()})
    throw Error(ErrorKind::usage,
                fmt::format("words of scale {}: expected {}, found {}", state.scale_,
                            to_string({state.pictures_, n, config_.bits()}), to_string(words.shape())));
  const Tensor normed =
      config_.nm0 ? backend_.layer_norm(words, norm0_weight_, norm0_bias_, static_cast<float>(config_.norm_eps))
                  : words;
  const Tensor embedded = backend_.linear(normed, *word_embed_, Activation::none, DType::f32);
  if (observe) observe(fmt::format("word_embed.s{}", state.scale_), embedded);
  if (state.rows_ == state.pictures_) return embedded;
  Tensor x = Tensor::empty(DType::f32, {state.rows_, n, width});
  std::memcpy(x.raw(), embedded.raw(), embedded.bytes());
  std::memcpy(x.data<float>() + embedded.size(), embedded.raw(), embedded.bytes());
  return x;
}

Tensor Infinity::forward(State& state, const Tensor& words, const Guidance& guidance, const Observer& observe,
                         const std::atomic<bool>* cancel) {
  const Grid grid = state.schedule_[state.scale_];
  if (config_.rope2d_each_sa_layer)
    state.rope_ =
        rope_table(grid, state.rope_grid_, config_.head_dim(), config_.rope_base, config_.rope2d_normalized_by_hw);
  const Tensor level = lvl_embed_.rows(state.scale_, state.scale_ + 1);
  Tensor x = embed(state, words, observe);
  const int per_chunk = config_.depth / config_.block_chunks;
  for (int layer = 0; layer < config_.depth; ++layer) {
    if (cancel != nullptr && cancel->load()) throw Error(ErrorKind::cancelled, "cancelled");
    if (layer == 0 || (!config_.add_lvl_embeding_only_first_block && layer % per_chunk == 0)) add_repeated(x, level);
    if (layer == 0 && observe) observe(fmt::format("block_input.s{}", state.scale_), x);
    run_block(state, layer, x, observe);
    guide_hidden(state, layer, x, guidance.cfg);
    if (observe) observe(fmt::format("hidden.s{}.b{}", state.scale_, layer), x);
  }
  Tensor logits = head(state, x, guidance, observe);
  state.keys_before_ += grid.tokens();
  ++state.scale_;
  return logits;
}

void Infinity::run_block(State& state, int layer, Tensor& x, const Observer& observe) {
  const Block& block = *blocks_[layer];
  const std::vector<Tensor>& ada = state.ada_[layer];
  const auto eps = static_cast<float>(config_.norm_eps);
  const DType compute = backend_.compute_type();
  const DType out = observe ? DType::f32 : compute;
  const auto see = [&](const char* part, const Tensor& y) {
    if (observe) observe(fmt::format("sub.s{}.b{}.{}", state.scale_, layer, part), y);
  };
  enum { gamma1, gamma2, scale1, scale2, shift1, shift2 };

  {
    const Tensor attended =
        self_attention(state, layer, backend_.layer_norm_modulate(x, ada[scale1], ada[shift1], eps, compute));
    const Tensor y = backend_.linear(attended, *block.sa_proj, Activation::none, out);
    see("sa", y);
    backend_.add_gated(x, y, ada[gamma1]);
  }
  {
    const Tensor q = backend_.linear(backend_.layer_norm(x, block.ca_norm_weight, block.ca_norm_bias, eps), *block.ca_q,
                                     Activation::none, compute);
    const Shape heads = {x.dim(0), x.dim(1), config_.num_heads, config_.head_dim()};
    const Tensor read = backend_.cross_attention(q.reshaped(heads), state.text_kv_[layer], state.text_offsets_,
                                                 1.0F / std::sqrt(static_cast<float>(config_.head_dim())));
    const Tensor y = backend_.linear(read.reshaped(x.shape()), *block.ca_proj, Activation::none, out);
    see("ca", y);
    backend_.add_gated(x, y, block.ca_gamma.defined() ? block.gamma_rows(state.rows_) : Tensor());
  }
  {
    const Tensor h = backend_.layer_norm_modulate(x, ada[scale2], ada[shift2], eps, compute);
    const Tensor y = backend_.linear(backend_.linear(h, *block.fc1, Activation::gelu_tanh, compute), *block.fc2,
                                     Activation::none, out);
    see("ffn", y);
    backend_.add_gated(x, y, ada[gamma2]);
  }
}

Tensor Infinity::self_attention(State& state, int layer, const Tensor& x) {
  const Block& block = *blocks_[layer];
  const std::int64_t n = x.dim(1);
  const std::int64_t heads = config_.num_heads;
  const std::int64_t dim = config_.head_dim();
  const DType compute = backend_.compute_type();
  const Tensor qkv =
      backend_.linear(x, *block.qkv, Activation::none, DType::f32).reshaped({x.dim(0), n, 3, heads, dim});

  const bool last = state.scale_ + 1 == static_cast<int>(state.schedule_.size());
  Tensor k = std::move(state.k_cache_[layer]);
  Tensor v = std::move(state.v_cache_[layer]);
  if (last) {  // room for this scale in buffers that the next layer takes over
    k = grown(k, n);
    v = grown(v, n);
  }
  AttentionArgs args{.q = Tensor::empty(compute, {x.dim(0), heads, n, dim}),
                     .k = k,
                     .v = v,
                     .out = Tensor::empty(compute, {x.dim(0), n, heads, dim}),
                     .scale = config_.cos_attn ? 1.0F : 1.0F / std::sqrt(static_cast<float>(dim)),
                     .statistics = {}};
  backend_.split_qkv(qkv,
                     {.heads = config_.num_heads,
                      .l2_norm = config_.cos_attn,
                      .head_scale = block.head_scale,
                      .rope = state.rope_,
                      .offset = state.keys_before_},
                     args.q, args.k, args.v);
  state.attention_.run(layer, state.scale_, args);
  if (!last) {
    state.k_cache_[layer] = std::move(k);
    state.v_cache_[layer] = std::move(v);
  }
  return args.out.reshaped(x.shape());
}

void Infinity::guide_hidden(const State& state, int layer, Tensor& x, float cfg) const {
  const auto& layers = config_.cfg_insertion_layer;
  if (cfg == 1.0F || state.rows_ == state.pictures_ ||
      std::find(layers.begin(), layers.end(), layer - config_.depth) == layers.end())
    return;
  const std::int64_t half = x.size() / 2;
  float* conditional = x.data<float>();
  float* unconditional = conditional + half;
  for (std::int64_t i = 0; i < half; ++i)
    conditional[i] = unconditional[i] = cfg * conditional[i] + (1.0F - cfg) * unconditional[i];
}

Tensor Infinity::head(State& state, const Tensor& x, const Guidance& guidance, const Observer& observe) {
  const auto& layers = config_.cfg_insertion_layer;
  const bool guided = guidance.cfg != 1.0F && state.rows_ > state.pictures_ &&
                      std::find(layers.begin(), layers.end(), 0) != layers.end();
  const int rows = guided ? state.rows_ : state.pictures_;
  const Tensor normed =
      backend_.layer_norm_modulate(x.rows(0, rows), state.head_scale_.rows(0, rows), state.head_shift_.rows(0, rows),
                                   static_cast<float>(config_.norm_eps), DType::f32);
  Tensor logits = backend_.linear(normed, *head_, Activation::none, DType::f32);
  Tensor result = logits.rows(0, state.pictures_);
  if (observe) {
    observe(fmt::format("logits_cond.s{}", state.scale_), result);
    if (guided) observe(fmt::format("logits_uncond.s{}", state.scale_), logits.rows(state.pictures_, rows));
  }
  float* conditional = result.data<float>();
  const float* unconditional = conditional + result.size();
  const float inverse_tau = 1.0F / guidance.tau;
  for (std::int64_t i = 0; i < result.size(); ++i) {
    const float value = conditional[i] * inverse_tau;
    conditional[i] = guided ? guidance.cfg * value + (1.0F - guidance.cfg) * (unconditional[i] * inverse_tau) : value;
  }
  if (observe) observe(fmt::format("logits_cfg.s{}", state.scale_), result);
  return result;
}

}  // namespace sparvar
