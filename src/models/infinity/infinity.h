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
#include "weights/safetensors.h"

namespace sparvar {

/// Sees intermediate tensors by the names of the golden fixtures ("cond_BD", "hidden.s3.b0", ...). Empty: nobody looks.
using Observer = std::function<void(const std::string& name, const Tensor& value)>;

/// Packed texts: f32 [total tokens, text_channels], text i in rows [offsets[i], offsets[i + 1]).
struct PackedText {
  Tensor states;
  std::vector<int> offsets{0};
  int count() const { return static_cast<int>(offsets.size()) - 1; }
};

/// Guidance and temperature of one scale.
struct Guidance {
  float cfg = 1.0F;
  float tau = 1.0F;
};

class Infinity {
 public:
  Infinity(const InfinityConfig& config, const TensorFile& weights, Backend& backend);
  const InfinityConfig& config() const { return config_; }
  std::int64_t parameters() const { return parameters_; }

  /// Everything a generation keeps between scales. Rows: pictures, then (with guidance) their unconditional halves.
  class State;
  /// `guided`: an unconditional half is run beside the texts.
  State begin(const PackedText& text, bool guided, const ScaleSchedule& schedule, Grid rope_grid,
              const AttentionPlan& plan, const Observer& observe = {});

  /// Runs the next scale. `words` f32 [pictures, n, bits]: resized summed codes (undefined at scale 0).
  /// Returns f32 [pictures, n, 2 * bits]: logits after guidance, divided by tau; bit j is the pair (2j, 2j + 1).
  /// Throws Error(cancelled) between layers where `cancel` is set.
  Tensor forward(State& state, const Tensor& words, const Guidance& guidance, const Observer& observe = {},
                 const std::atomic<bool>* cancel = nullptr);

 private:
  struct Block;
  struct Modulation;
  Tensor embed(State& state, const Tensor& words, const Observer& observe);
  void run_block(State& state, int layer, Tensor& x, const Observer& observe);
  Tensor self_attention(State& state, int layer, const Tensor& x);
  Tensor head(State& state, const Tensor& x, const Guidance& guidance, const Observer& observe);
  void guide_hidden(const State& state, int layer, Tensor& x, float cfg) const;

  InfinityConfig config_;
  Backend& backend_;
  std::int64_t parameters_ = 0;
  Tensor cfg_uncond_, text_norm_, pos_start_, lvl_embed_, norm0_weight_, norm0_bias_, pool_query_;
  LinearPtr pool_kv_, pool_proj_, text_proj_0_, text_proj_2_, shared_ada_, word_embed_, head_ada_, head_;
  std::vector<std::shared_ptr<Block>> blocks_;
};

class Infinity::State {
 public:
  int scale() const { return scale_; }
  int pictures() const { return pictures_; }
  const ScaleSchedule& schedule() const { return schedule_; }
  const AttentionRunner& attention() const { return attention_; }

 private:
  friend class Infinity;
  State(Backend& backend, const AttentionPlan& plan, const ScaleSchedule& schedule, int layers)
      : schedule_(schedule), attention_(backend, plan, schedule, layers) {}

  ScaleSchedule schedule_;
  Grid rope_grid_;
  AttentionRunner attention_;
  int scale_ = 0;
  int pictures_ = 0;
  int rows_ = 0;         // pictures, or twice that
  int keys_before_ = 0;  // tokens of the scales before
  std::vector<int> text_offsets_;
  Tensor condition_;                       // f32 [rows, C] (cond_BD)
  std::vector<Tensor> text_kv_;            // per layer: [total, 2, H, D], compute type
  std::vector<std::vector<Tensor>> ada_;   // per layer: gamma1, gamma2, scale1, scale2, shift1, shift2, f32 [rows, C]
  Tensor head_scale_, head_shift_;         // f32 [rows, C]
  std::vector<Tensor> k_cache_, v_cache_;  // per layer: [rows, H, tokens of all scales but the last, D]
  Tensor rope_;                            // f32 [n, D/2, 2] of the current scale
};

/// RoPE table f32 [h * w, D/2, 2] of (cos, sin): first half of the pairs by row, second by column. Mode: 0 plain, 1
/// table interpolated to the grid, 2 positions rounded to `reference` (upstream precompute_rope2d_freqs_grid).
Tensor rope_table(Grid grid, Grid reference, int head_dim, double base, int mode);

}  // namespace sparvar
