#include "models/infinity/infinity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/cancel.h"
#include "models/infinity/block.h"
#include "models/token_pruning.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kScalePart = 0;  // of a head modulation [2, rows, C]
constexpr int kShiftPart = 1;
enum Part { gamma1, gamma2, scale1, scale2, shift1, shift2 };  // of a block's [6, rows, C]

/// Part `part` of a modulation [parts, all rows, C]: its first `rows`, [rows, C].
Tensor part_of(const Tensor& modulation, int part, std::int64_t rows) {
  return modulation.rows(part, part + 1).reshaped({modulation.dim(1), modulation.dim(2)}).rows(0, rows);
}

/// Tokens of scales [0, end) without the last scale of all, whose keys are never kept past their layer.
int cached_tokens(const ScaleSchedule& schedule, int end) {
  int tokens = 0;
  for (int k = 0; k < end && k + 1 < static_cast<int>(schedule.size()); ++k) tokens += schedule[k].tokens();
  return tokens;
}

/// The rows `order` of x [n, ...], on the host; all where it is empty.
Tensor rows_in_order(const Tensor& x, const std::vector<std::int32_t>& order) {
  if (order.empty()) return x;
  const Tensor flat = x.reshaped({1, x.dim(0), x.size() / x.dim(0)});
  return rows_taken(flat, order).reshaped(x.shape());
}

/// Tokens of x [B, n, C] in another order, as f32; x where it is empty.
Tensor tokens_in_order(Backend& backend, const Tensor& x, const std::vector<std::int32_t>& order) {
  if (order.empty()) return x;
  return backend.gather_rows(x.reshaped({x.dim(0), x.dim(1), 1, x.dim(2)}), order).reshaped(x.shape());
}

/// An observer looks at host memory.
void show(Backend& backend, const Observer& observe, const std::string& name, const Tensor& value) {
  if (observe) observe(name, backend.download(value));
}

}  // namespace

Infinity::Infinity(const InfinityConfig& config, const Weights& weights, Backend& backend)
    : config_(config), backend_(backend), parameters_(weights.parameters()) {
  const std::int64_t width = config.embed_dim;
  const std::int64_t text = config.text_channels;
  const int bits = config.bits();
  // All of these are small beside the blocks, and every bit hangs on the last: they multiply in f32.
  const auto linear = [&](const std::string& name, std::int64_t out, std::int64_t in) {
    return backend.prepare_linear(weights.get(name + ".weight", {out, in}), weights.get(name + ".bias", {out}),
                                  LinearKind::precise);
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
  text_norm_ = backend.upload(weights.f32("text_norm.weight", {text}));
  pool_query_ = backend.upload(weights.f32("text_proj_for_sos.ca.mat_q", {1, pool_heads, width / pool_heads}));
  pool_kv_ = backend.prepare_linear(weights.get("text_proj_for_sos.ca.mat_kv.weight", {2 * width, text}),
                                    key_value_bias(weights, "text_proj_for_sos.ca", width), LinearKind::precise);
  pool_proj_ = linear("text_proj_for_sos.ca.proj", width, width);
  text_proj_0_ = linear("text_proj_for_ca.0", width, text);
  text_proj_2_ = linear("text_proj_for_ca.2", width, width);
  pos_start_ = backend.upload(weights.f32("pos_start", {1, 1, width}));
  lvl_embed_ = backend.upload(weights.get("lvl_embed.weight").to(DType::f32));
  if (lvl_embed_.rank() != 2 || lvl_embed_.dim(1) != width)
    throw Error(ErrorKind::input, fmt::format("{}: tensor lvl_embed.weight: expected [levels, {}], found {}",
                                              weights.path(), width, to_string(lvl_embed_.shape())));
  if (config.nm0) {
    norm0_weight_ = backend.upload(weights.f32("norm0_ve.weight", {bits}));
    norm0_bias_ = backend.upload(weights.f32("norm0_ve.bias", {bits}));
  }
  word_embed_ = linear("word_embed", width, bits);
  if (config.shared_aln) shared_ada_ = linear("shared_ada_lin.1", 6 * width, width);
  head_ada_ = linear("head_nm.ada_lin.1", 2 * width, width);
  head_ = linear("head", 2L * bits, width);
  for (int layer = 0; layer < config.depth; ++layer)
    blocks_.push_back(std::make_shared<Block>(config, layer, weights, backend));
}

Infinity::State Infinity::make_state(const StateShape& shape) {
  const ScaleSchedule& schedule = shape.schedule;
  if (static_cast<std::int64_t>(schedule.size()) > lvl_embed_.dim(0))
    throw Error(ErrorKind::usage, fmt::format("{} scales, but the model has level embeddings for {}", schedule.size(),
                                              lvl_embed_.dim(0)));
  if (shape.uncond_until < 1)
    throw Error(ErrorKind::usage, "a state without an unconditional half at any scale is one that is not guided");
  if (shape.plan.pruning && (shape.pictures > 1 || backend_.records()))
    throw Error(ErrorKind::usage,
                fmt::format("plan {} prunes tokens: one picture at a time, on the CPU", shape.plan.name));
  State state(backend_, shape, config_.depth);
  const std::int64_t tokens = shape.text_tokens * (shape.guided ? 2 : 1);
  state.text_ = backend_.zeros(DType::f32, {tokens, config_.text_channels});
  state.text_offsets_ = backend_.zeros(DType::i32, {state.rows_ + 1});
  for (const Grid& grid : schedule) {
    Tensor rope;
    if (config_.rope2d_each_sa_layer)
      rope = rows_in_order(
          rope_table(grid, shape.rope_grid, config_.head_dim(), config_.rope_base, config_.rope2d_normalized_by_hw),
          tokens_by_place({grid, shape.order}));
    state.rope_.push_back(rope.defined() ? backend_.upload(rope) : rope);
  }
  make_caches(state);
  return state;
}

/// Those that are not there: a picture before this one has used them up, or they were released. A device that does not
/// record keeps the unconditional half only for the scales that have one (drop_unconditional_half).
void Infinity::make_caches(State& state) {
  const StateShape& made_for = state.shape_;
  const auto scales = static_cast<int>(made_for.schedule.size());
  const bool shrinks = made_for.guided && made_for.uncond_until < scales && !backend_.records();
  const Shape shape = {state.rows_, config_.num_heads,
                       cached_tokens(made_for.schedule, shrinks ? made_for.uncond_until : scales), config_.head_dim()};
  state.k_cache_.resize(config_.depth);
  state.v_cache_.resize(config_.depth);
  for (auto* caches : {&state.k_cache_, &state.v_cache_})
    for (Tensor& cache : *caches)
      if (!cache.defined() || cache.shape() != shape) cache = backend_.empty(backend_.compute_type(), shape);
}

/// At the first scale without guidance: keys and values of the conditional half alone, with room for the scales to
/// come.
void Infinity::drop_unconditional_half(State& state, int scale) {
  const StateShape& shape = state.shape_;
  if (!shape.guided || scale != shape.uncond_until || backend_.records()) return;
  const ScaleSchedule& schedule = shape.schedule;
  const int more = cached_tokens(schedule, static_cast<int>(schedule.size())) - cached_tokens(schedule, scale);
  for (auto* caches : {&state.k_cache_, &state.v_cache_})
    for (Tensor& cache : *caches) cache = backend_.grown(cache.rows(0, shape.pictures), more);
}

void Infinity::release_caches(State& state) const {
  for (auto* caches : {&state.k_cache_, &state.v_cache_})
    for (Tensor& cache : *caches) cache = Tensor();
  state.attention_.release();
}

void Infinity::write_text(State& state, const PackedText& text) {
  const std::int64_t channels = config_.text_channels;
  const std::int64_t total = text.offsets.back();
  const bool guided = state.shape_.guided;
  const int halves = guided ? 2 : 1;
  if (text.count() != state.shape_.pictures || halves * total > state.text_.dim(0))
    throw Error(ErrorKind::usage, fmt::format("{} texts of {} tokens do not fit a state for {} of {}", text.count(),
                                              total, state.shape_.pictures, state.text_.dim(0) / halves));
  // The unconditional half of each text: as many learned states as the text has tokens.
  Tensor packed = Tensor::empty(DType::f32, {halves * total, channels});
  Tensor offsets = Tensor::empty(DType::i32, {state.rows_ + 1});
  std::copy_n(text.states.data<float>(), total * channels, packed.data<float>());
  std::copy(text.offsets.begin(), text.offsets.end(), offsets.data<std::int32_t>());
  for (int i = 0; i < text.count(); ++i) {
    const int length = text.offsets[i + 1] - text.offsets[i];
    if (state.shape_.longest_text > 0 && length > state.shape_.longest_text)
      throw Error(ErrorKind::usage,
                  fmt::format("a prompt of {} tokens does not fit a state for {}", length, state.shape_.longest_text));
    if (!guided) continue;
    if (length > cfg_uncond_.dim(0))
      throw Error(ErrorKind::usage, fmt::format("a prompt of {} tokens: the model takes at most {} (text_maxlen)",
                                                length, cfg_uncond_.dim(0)));
    std::copy_n(cfg_uncond_.data<float>(), length * channels,
                packed.data<float>() + (total + text.offsets[i]) * channels);
    offsets.data<std::int32_t>()[text.count() + i + 1] = static_cast<std::int32_t>(total) + text.offsets[i + 1];
  }
  Tensor target = state.text_.rows(0, halves * total);
  backend_.write(target, packed);
  backend_.write(state.text_offsets_, offsets);
}

std::int64_t Infinity::folded_rows(const StateShape& shape) const {
  const Block& block = *blocks_.front();
  return backend_.folded_rows(*block.ca_q, *block.ca_proj, config_.num_heads, shape.rows_at(0), shape.longest_text);
}

void Infinity::read_text(State& state, const Observer& observe) {
  const std::int64_t width = config_.embed_dim;
  const std::int64_t tokens = state.text_.dim(0);
  const DType compute = backend_.compute_type();
  const Tensor normed = backend_.rms_norm(state.text_, text_norm_, static_cast<float>(config_.norm_eps), DType::f32);
  show(backend_, observe, "text_normed", normed);

  // Attentive pool: one learned query a head, attending to the whole text.
  const std::int64_t heads = pool_query_.dim(1);
  const std::int64_t head_dim = pool_query_.dim(2);
  const Tensor query = backend_.repeat(pool_query_, state.rows_).reshaped({state.rows_, 1, heads, head_dim});
  const Tensor pool_kv =
      backend_.linear(normed, *pool_kv_, Activation::none, DType::f32).reshaped({tokens, 2, heads, head_dim});
  const Tensor pooled = backend_.cross_attention(query, pool_kv, state.text_offsets_, state.shape_.longest_text,
                                                 1.0F / std::sqrt(static_cast<float>(head_dim)), false);
  state.condition_ = backend_.linear(pooled.reshaped({state.rows_, width}), *pool_proj_, Activation::none, DType::f32);
  show(backend_, observe, "cond_BD", state.condition_);

  const Tensor hidden = backend_.linear(normed, *text_proj_0_, Activation::gelu_tanh, DType::f32);
  const Tensor text_kv = backend_.linear(hidden, *text_proj_2_, Activation::none, DType::f32);
  show(backend_, observe, "ca_kv", text_kv);

  const Tensor condition = backend_.apply(state.condition_, Activation::silu);
  Tensor shared;
  if (shared_ada_) {
    shared = backend_.linear(condition, *shared_ada_, Activation::none, DType::f32);
    show(backend_, observe, "cond_gss", shared);
  }
  state.ada_.resize(blocks_.size());
  state.text_kv_.resize(blocks_.size());
  state.folded_.resize(blocks_.size());
  const bool folds = folded_rows(state.shape_) > 0;
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    const Block& block = *blocks_[layer];
    const Tensor ada =
        block.ada_lin ? backend_.linear(condition, *block.ada_lin, Activation::none, DType::f32) : shared;
    state.ada_[layer] = backend_.modulation(ada, block.ada_gss, 6);
    state.text_kv_[layer] = backend_.linear(text_kv, *block.ca_kv, Activation::none, compute)
                                .reshaped({tokens, 2, config_.num_heads, config_.head_dim()});
    if (folds)
      state.folded_[layer] = backend_.fold_text(state.text_kv_[layer], state.text_offsets_, state.shape_.longest_text,
                                                *block.ca_q, *block.ca_proj);
  }
  state.head_ada_ =
      backend_.modulation(backend_.linear(condition, *head_ada_, Activation::none, DType::f32), Tensor(), 2);
}

/// What is fixed while one scale runs.
struct Infinity::Scale {
  int index = 0;
  Grid grid;
  int rows = 0;         // pictures, and their unconditional halves where the scale has guidance
  int keys_before = 0;  // tokens that ran at the scales before
  bool last = false;
  /// The residual that was computed and not yet added: it is added by the norm that follows it.
  Tensor pending, pending_gate;
  Tensor rope;                     // of the tokens that run
  std::vector<std::int32_t> kept;  // tokens that run, ascending; empty: all
};

Tensor Infinity::embed(State& state, const Scale& scale, const Tensor& words, const Observer& observe) {
  const std::int64_t width = config_.embed_dim;
  const int n = scale.grid.tokens();
  const int pictures = state.shape_.pictures;
  if (scale.index == 0) {
    Tensor x = backend_.clone(state.condition_).reshaped({state.rows_, 1, width});
    backend_.add_repeated(x, pos_start_);
    return x;
  }
  if (words.shape() != Shape{pictures, n, config_.bits()})
    throw Error(ErrorKind::usage, fmt::format("words of scale {}: expected {}, found {}", scale.index,
                                              to_string({pictures, n, config_.bits()}), to_string(words.shape())));
  const Tensor ordered = tokens_in_order(backend_, words, tokens_by_place({scale.grid, state.shape_.order}));
  const NormArgs norm{.scale = norm0_weight_,
                      .shift = norm0_bias_,
                      .one_plus = 0,
                      .eps = static_cast<float>(config_.norm_eps),
                      .out = DType::f32};
  const Tensor normed = config_.nm0 ? backend_.layer_norm(ordered, norm) : ordered;
  const Tensor embedded = backend_.linear(normed, *word_embed_, Activation::none, DType::f32);
  if (observe)
    show(backend_, observe, fmt::format("word_embed.s{}", scale.index), by_rows(state, scale.index, embedded));
  return scale.rows == pictures ? embedded : backend_.repeat(embedded, 2);
}

/// Tokens of a scale, of a tensor [B, n, C], row by row again. Those that are left of a pruned scale stay as they are.
Tensor Infinity::by_rows(const State& state, int scale, const Tensor& x) const {
  if (x.dim(1) != state.shape_.schedule[scale].tokens()) return x;
  return tokens_in_order(backend_, x, places_of_tokens({state.shape_.schedule[scale], state.shape_.order}));
}

bool Infinity::guides_after(int layer) const {
  const auto& layers = config_.cfg_insertion_layer;
  return std::find(layers.begin(), layers.end(), layer - config_.depth) != layers.end();
}

Tensor Infinity::forward(State& state, int index, const Tensor& words, const Tensor& guidance, const Observer& observe,
                         const std::atomic<bool>* cancel) {
  const ScaleSchedule& schedule = state.shape_.schedule;
  Scale scale;
  scale.index = index;
  scale.grid = schedule[index];
  scale.last = index + 1 == static_cast<int>(schedule.size());
  scale.rows = state.shape_.rows_at(index);
  scale.rope = state.rope_[index];
  for (int k = 0; k < index; ++k) scale.keys_before += state.shape_.plan.tokens_run(k, schedule[k]);
  state.attention_.start(index);
  if (index == 0) make_caches(state);
  drop_unconditional_half(state, index);

  const Tensor level = lvl_embed_.rows(index, index + 1);
  Tensor x = embed(state, scale, words, observe);
  const int per_chunk = config_.depth / config_.block_chunks;
  const auto settle = [&] {
    if (scale.pending.defined()) backend_.add_gated(x, scale.pending, scale.pending_gate);
    scale.pending = scale.pending_gate = Tensor();
  };
  for (int layer = 0; layer < config_.depth; ++layer) {
    throw_if_cancelled(cancel);
    if (layer == 0 || (!config_.add_lvl_embeding_only_first_block && layer % per_chunk == 0)) {
      settle();
      backend_.add_repeated(x, level);
    }
    if (layer == 0 && observe) show(backend_, observe, fmt::format("block_input.s{}", index), by_rows(state, index, x));
    if (layer == 0) prune(state, scale, x);
    run_block(state, scale, layer, x, observe);
    const bool guide = state.shape_.guided_at(index) && guides_after(layer);
    if (guide || observe) settle();
    if (guide) backend_.guide_hidden(x, guidance);
    if (observe) show(backend_, observe, fmt::format("hidden.s{}.b{}", index, layer), by_rows(state, index, x));
  }
  settle();
  fill(state, scale, x);
  return head(state, scale, x, guidance, observe);
}

/// Leaves the tokens of a pruned scale that run. Both halves see the same words, so the same tokens are theirs.
void Infinity::prune(State& state, Scale& scale, Tensor& x) const {
  const AttentionPlan& plan = state.shape_.plan;
  if (!plan.pruning || scale.index < plan.pruning->first_scale) return;
  scale.kept = farthest_rows(x, plan.tokens_run(scale.index, scale.grid));
  x = rows_taken(x, scale.kept);
  if (!scale.rope.defined()) return;
  const Tensor& rope = scale.rope;  // [n, D/2, 2]
  const Tensor rows = rope.reshaped({1, rope.dim(0), rope.dim(1) * rope.dim(2)});
  scale.rope =
      rows_taken(rows, scale.kept).reshaped({static_cast<std::int64_t>(scale.kept.size()), rope.dim(1), rope.dim(2)});
}

/// After the blocks: remembers the output of the scale before the pruned ones; there it stands, resized, for the tokens
/// that did not run.
void Infinity::fill(State& state, const Scale& scale, Tensor& x) {
  const AttentionPlan& plan = state.shape_.plan;
  if (plan.pruning && scale.index + 1 == plan.pruning->first_scale) state.output_ = backend_.clone(x);
  if (scale.kept.empty()) return;
  const Grid before = state.shape_.schedule[plan.pruning->first_scale - 1];
  const std::int64_t rows = x.dim(0), width = x.dim(2);
  Tensor all = backend_.zeros(DType::f32, {rows, scale.grid.tokens(), 1, width});
  backend_.add_resized(all, state.output_.rows(0, rows).reshaped({rows, before.tokens(), 1, width}),
                       {before, state.shape_.order}, {scale.grid, state.shape_.order});
  all = all.reshaped({rows, scale.grid.tokens(), width});
  put_rows(all, scale.kept, x);
  x = std::move(all);
}

void Infinity::run_block(State& state, Scale& scale, int layer, Tensor& x, const Observer& observe) {
  const Block& block = *blocks_[layer];
  const auto modulation = [&](Part which) { return part_of(state.ada_[layer], which, scale.rows); };
  const auto eps = static_cast<float>(config_.norm_eps);
  const DType compute = backend_.compute_type();
  const DType out = observe ? DType::f32 : compute;
  const auto norm = [&](const Tensor& weight, const Tensor& bias, float one_plus, const Linear& reader) {
    const NormArgs args{.scale = weight,
                        .shift = bias,
                        .one_plus = one_plus,
                        .eps = eps,
                        .out = reader.input,
                        .settled = true};  // the text's program made the modulations
    const Tensor y = std::exchange(scale.pending, Tensor());
    const Tensor gate = std::exchange(scale.pending_gate, Tensor());
    return y.defined() ? backend_.add_gated_norm(x, y, gate, args) : backend_.layer_norm(x, args);
  };
  const auto leave = [&](const char* part, Tensor y, Tensor gate) {
    if (observe)
      show(backend_, observe, fmt::format("sub.s{}.b{}.{}", scale.index, layer, part), by_rows(state, scale.index, y));
    scale.pending = std::move(y);
    scale.pending_gate = std::move(gate);
  };

  {
    const Tensor attended =
        self_attention(state, scale, layer, norm(modulation(scale1), modulation(shift1), 1.0F, *block.qkv));
    leave("sa", backend_.linear(attended, *block.sa_proj, Activation::none, out), modulation(gamma1));
  }
  const Tensor asking = norm(block.ca_norm_weight, block.ca_norm_bias, 0.0F, *block.ca_q);
  leave("ca", cross_attention(state, scale, layer, asking, out), block.ca_gamma);
  {
    const Tensor h = norm(modulation(scale2), modulation(shift2), 1.0F, *block.fc1);
    const Tensor hidden = backend_.linear(h, *block.fc1, Activation::gelu_tanh, block.fc2->input);
    leave("ffn", backend_.linear(hidden, *block.fc2, Activation::none, out), modulation(gamma2));
  }
}

/// With the output's projection.
Tensor Infinity::cross_attention(const State& state, const Scale& scale, int layer, const Tensor& x, DType out) {
  const Block& block = *blocks_[layer];
  const Tensor offsets = state.text_offsets_.rows(0, scale.rows + 1);
  const float factor = 1.0F / std::sqrt(static_cast<float>(config_.head_dim()));
  const FoldedText& folded = state.folded_[layer];
  if (folded.keys.defined() && x.dim(0) * x.dim(1) >= folded_rows(state.shape_)) {
    const FoldedText text{.keys = folded.keys.rows(0, scale.rows),
                          .bias = folded.bias.rows(0, scale.rows),
                          .values = folded.values.rows(0, scale.rows)};
    return backend_.folded_cross_attention(x, text, offsets, config_.num_heads, *block.ca_proj, factor, out);
  }
  const Tensor q = backend_.linear(x, *block.ca_q, Activation::none, backend_.compute_type());
  const Shape heads = {x.dim(0), x.dim(1), config_.num_heads, config_.head_dim()};
  const Tensor read = backend_.cross_attention(q.reshaped(heads), state.text_kv_[layer], offsets,
                                               state.shape_.longest_text, factor, true);
  return backend_.linear(read.reshaped(x.shape()), *block.ca_proj, Activation::none, out);
}

Tensor Infinity::self_attention(State& state, const Scale& scale, int layer, const Tensor& x) {
  const Block& block = *blocks_[layer];
  const std::int64_t n = x.dim(1);
  const std::int64_t heads = config_.num_heads;
  const std::int64_t dim = config_.head_dim();
  const DType compute = backend_.compute_type();
  Tensor qkv =
      backend_.linear(x, *block.qkv, Activation::none, backend_.product_type()).reshaped({x.dim(0), n, 3, heads, dim});

  Tensor k = state.k_cache_[layer].rows(0, scale.rows);
  Tensor v = state.v_cache_[layer].rows(0, scale.rows);
  if (scale.last) {  // room for this scale in buffers that the next layer takes over
    if (!backend_.records()) state.k_cache_[layer] = Tensor();
    k = backend_.grown(k, n);
    if (!backend_.records()) state.v_cache_[layer] = Tensor();
    v = backend_.grown(v, n);
  }
  AttentionArgs args{.q = backend_.empty(compute, {x.dim(0), heads, n, dim}),
                     .k = std::move(k),
                     .v = std::move(v),
                     .out = {},
                     .scale = config_.cos_attn ? 1.0F : 1.0F / std::sqrt(static_cast<float>(dim)),
                     .statistics = {}};
  backend_.split_qkv(qkv,
                     {.heads = config_.num_heads,
                      .l2_norm = config_.cos_attn,
                      .head_scale = block.head_scale,
                      .rope = scale.rope,
                      .offset = scale.keys_before},
                     args.q, args.k, args.v);
  qkv = Tensor();  // its memory is the output's
  args.out = backend_.empty(compute, {x.dim(0), n, heads, dim});
  state.attention_.run(layer, scale.index, args);
  return args.out.reshaped(x.shape());
}

Tensor Infinity::head(State& state, const Scale& scale, const Tensor& x, const Tensor& guidance,
                      const Observer& observe) {
  const int pictures = state.shape_.pictures;
  const bool guided = state.shape_.guided_at(scale.index) && guides_after(config_.depth);
  const int rows = guided ? scale.rows : pictures;
  const Tensor normed = backend_.layer_norm(x.rows(0, rows), {.scale = part_of(state.head_ada_, kScalePart, rows),
                                                              .shift = part_of(state.head_ada_, kShiftPart, rows),
                                                              .one_plus = 1.0F,
                                                              .eps = static_cast<float>(config_.norm_eps),
                                                              .out = DType::f32});
  const Tensor logits = by_rows(state, scale.index, backend_.linear(normed, *head_, Activation::none, DType::f32));
  show(backend_, observe, fmt::format("logits_cond.s{}", scale.index), logits.rows(0, pictures));
  if (guided) show(backend_, observe, fmt::format("logits_uncond.s{}", scale.index), logits.rows(pictures, rows));
  Tensor result = backend_.guide_logits(logits, pictures, guidance);
  show(backend_, observe, fmt::format("logits_cfg.s{}", scale.index), result);
  return result;
}

}  // namespace sparvar
