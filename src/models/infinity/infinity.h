// Infinity text-to-image transformer (upstream infinity/models/infinity.py, basic.py): text states and the words of a
// scale in, the logits of its bits out. Tensor names are upstream's.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "models/attention_runner.h"
#include "sparvar/schedule.h"
#include "weights/config.h"
#include "weights/weights.h"

namespace sparvar {

/// Sees intermediate tensors by the names of the golden fixtures ("cond_BD", "hidden.s3.b0", ...). Empty: nobody looks.
using Observer = std::function<void(const std::string& name, const Tensor& value)>;

/// Packed texts: f32 [total tokens, text_channels], text i in rows [offsets[i], offsets[i + 1]).
struct PackedText {
  Tensor states;
  std::vector<int> offsets{0};
  int count() const { return static_cast<int>(offsets.size()) - 1; }
};

/// What a generation is made for: everything its tensors' shapes depend on.
struct StateShape {
  int pictures = 1;
  bool guided = true;             // an unconditional half is run beside the texts
  int uncond_until = kAllScales;  // from this scale on the unconditional half is left out; above 0
  ScaleSchedule schedule;         // of the scales that are drawn
  Grid full{};                    // the grid the codes are summed on; 0x0: the last of the schedule
  Grid rope_grid;
  AttentionPlan plan;
  TokenOrder order{};             // of a scale's tokens between the words that come in and the logits that go out
  std::int64_t text_tokens = 0;   // of all texts, at most
  std::int64_t longest_text = 0;  // of one, at most; 0: not known
  bool operator==(const StateShape&) const = default;

  static constexpr int kAllScales = 1 << 20;
  Grid full_grid() const { return full.tokens() > 0 ? full : schedule.back(); }
  bool guided_at(int scale) const { return guided && scale < uncond_until; }
  int rows_at(int scale) const { return pictures * (guided_at(scale) ? 2 : 1); }
};

class Infinity {
 public:
  Infinity(const InfinityConfig& config, const Weights& weights, Backend& backend);
  const InfinityConfig& config() const { return config_; }
  std::int64_t parameters() const { return parameters_; }
  /// As Backend::folded_rows, of a state's texts.
  std::int64_t folded_rows(const StateShape& shape) const;

  /// Everything a generation keeps between scales. Rows: pictures, then (with guidance) their unconditional halves.
  /// Throws Error(usage) where the model has no such shape.
  class State;
  State make_state(const StateShape& shape);
  /// Puts texts into the state's input tensors; not a part of a program.
  void write_text(State& state, const PackedText& text);
  /// What depends on the texts alone: condition, modulations, keys and values of the cross attention.
  void read_text(State& state, const Observer& observe = {});

  /// Lets go of the KV cache once every program of a walk was recorded: its addresses stay with the programs, and what
  /// is recorded next (the decoder) may use them in between.
  void release_caches(State& state) const;

  /// Runs scale `index`; scales come in order. `words` f32 [pictures, n, bits]: resized summed codes (undefined at
  /// scale 0). `guidance` f32 [1, 2]: (cfg, 1 / tau).
  /// Returns f32 [pictures, n, 2 * bits]: logits after guidance, divided by tau; bit j is the pair (2j, 2j + 1).
  /// Throws Error(cancelled) between layers where `cancel` is set.
  Tensor forward(State& state, int index, const Tensor& words, const Tensor& guidance, const Observer& observe = {},
                 const std::atomic<bool>* cancel = nullptr);

 private:
  struct Block;
  struct Scale;
  void make_caches(State& state);
  void drop_unconditional_half(State& state, int scale);
  Tensor embed(State& state, const Scale& scale, const Tensor& words, const Observer& observe);
  Tensor by_rows(const State& state, int scale, const Tensor& x) const;
  void prune(State& state, Scale& scale, Tensor& x) const;
  void fill(State& state, const Scale& scale, Tensor& x);
  void run_block(State& state, Scale& scale, int layer, Tensor& x, const Observer& observe);
  Tensor self_attention(State& state, const Scale& scale, int layer, const Tensor& x);
  Tensor cross_attention(const State& state, const Scale& scale, int layer, const Tensor& x, DType out);
  Tensor head(State& state, const Scale& scale, const Tensor& x, const Tensor& guidance, const Observer& observe);
  bool guides_after(int layer) const;

  InfinityConfig config_;
  Backend& backend_;
  std::int64_t parameters_ = 0;
  Tensor cfg_uncond_;  // on the host
  Tensor text_norm_, pos_start_, lvl_embed_, norm0_weight_, norm0_bias_, pool_query_;
  LinearPtr pool_kv_, pool_proj_, text_proj_0_, text_proj_2_, shared_ada_, word_embed_, head_ada_, head_;
  std::vector<std::shared_ptr<Block>> blocks_;
};

class Infinity::State {
 public:
  const StateShape& shape() const { return shape_; }
  const AttentionRunner& attention() const { return attention_; }
  void observe_lists(ListObserver observer) { attention_.observe(std::move(observer)); }
  void observe_queries(QueryObserver observer) { attention_.observe_queries(std::move(observer)); }
  void observe_choices(ChoiceObserver observer) { attention_.observe_choices(std::move(observer)); }

 private:
  friend class Infinity;
  State(Backend& backend, const StateShape& shape, int layers)
      : shape_(shape), rows_(shape.rows_at(0)), attention_(backend, shape.plan, shape.schedule, layers, shape.order) {}

  StateShape shape_;
  int rows_ = 0;  // pictures, or twice that; of scale 0
  AttentionRunner attention_;
  Tensor text_;                     // f32 [text tokens, channels] of all rows: an input
  Tensor text_offsets_;             // I32 [rows + 1]: an input
  std::vector<Tensor> rope_;        // per scale: f32 [n, D/2, 2], in the order of the tokens
  Tensor condition_;                // f32 [rows, C] (cond_BD)
  std::vector<Tensor> text_kv_;     // per layer: [total, 2, H, D], compute type
  std::vector<FoldedText> folded_;  // per layer, where the device folds texts
  std::vector<Tensor> ada_;         // per layer: gamma1, gamma2, scale1, scale2, shift1, shift2, f32 [6, rows, C]
  Tensor head_ada_;                 // scale, shift: f32 [2, rows, C]
  Tensor output_;                   // f32 [rows, n, C]: of the blocks, at the scale before the pruned ones
  std::vector<Tensor> k_cache_, v_cache_;  // per layer: [rows, H, tokens kept, D]; see cached_tokens
};

/// RoPE table f32 [h * w, D/2, 2] of (cos, sin): first half of the pairs by row, second by column. Mode: 0 plain, 1
/// table interpolated to the grid, 2 positions rounded to `reference` (upstream precompute_rope2d_freqs_grid).
Tensor rope_table(Grid grid, Grid reference, int head_dim, double base, int mode);

}  // namespace sparvar
