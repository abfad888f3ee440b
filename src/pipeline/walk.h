// The walk up the scales: logits -> bits -> summed codes -> the words of the next scale.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "bits/sampling.h"
#include "models/infinity/infinity.h"
#include "sparvar/pipeline.h"

namespace sparvar {

/// What may change from picture to picture.
struct WalkInputs {
  std::vector<float> cfg;  // per scale
  std::vector<float> tau;
  Sampling sampling;
  std::uint64_t first_picture = 0;
  std::function<void(const ScaleTiming&, int scale)> on_scale;
  ListObserver on_lists;       // not on a device that records
  QueryObserver on_attention;  // of tensors of the device
  /// Sees the codes f32 [pictures, d, H, W] summed so far after each scale, before the next one begins.
  std::function<void(const Tensor& summed, int scale)> on_codes;
  const std::atomic<bool>* cancel = nullptr;
};

/// For comparing with golden tensors. A run with any of these, or with WalkInputs::on_attention, is watched: it goes
/// operation by operation.
struct WalkWatch {
  /// Sees every tensor the golden fixtures name, bits, summed codes and next features included.
  Observer observe;
  /// Where given, its bits U8 [B, n, bits] are used instead of the sampled ones (teacher forcing).
  std::function<Tensor(int scale)> forced_bits;
  ChoiceObserver on_choice;
};

/// A walk of one shape: its state, and one program per scale. On a backend that records, pictures of the same shape
/// cost no new recording.
class Walk {
 public:
  Walk(Infinity& model, Backend& backend, const StateShape& shape);
  Walk(const Walk&) = delete;
  Walk& operator=(const Walk&) = delete;
  const StateShape& shape() const { return state_.shape(); }
  /// Was a run of it watched? Where the backend records, later ones must be too: what is alive is not what was planned.
  bool was_watched() const { return was_watched_; }

  /// Puts all programs to a run, with what else is done after each scale; for Backend::reserve.
  void run_programs(const std::function<void(int scale)>& after_scale = {});
  /// Returns the summed codes f32 [pictures, d, H, W] on the VAE grid of the last scale: a tensor of the backend, that
  /// the next run overwrites.
  const Tensor& run(const PackedText& text, const WalkInputs& inputs, const WalkWatch& watch = {});

 private:
  void read_text(const WalkWatch& watch);
  void run_scale(int k, const WalkWatch& watch, const std::atomic<bool>* cancel);
  void write_inputs(const PackedText& text, const WalkInputs& inputs);
  ScaleTiming timing(int k, double seconds) const;
  void run_watched(const WalkInputs& inputs, const WalkWatch& watch);
  void run_recorded(const WalkInputs& inputs);
  /// Scale after scale, each waited for and told of before the next begins.
  void run_in_turn(const WalkInputs& inputs, const std::function<void(int scale)>& run);

  Infinity& model_;
  Backend& backend_;
  Infinity::State state_;
  Tensor guidance_;  // f32 [scales, 2]: (cfg, 1 / tau), an input
  Tensor sampling_;  // of SamplingWords, an input
  Tensor summed_;
  std::vector<Tensor> words_;  // of the next scale
  ProgramPtr text_program_;
  std::vector<ProgramPtr> scale_programs_;
  bool was_watched_ = false;
};

/// Everything a walk needs, for one that is made, run and forgotten.
struct WalkOptions : WalkInputs, WalkWatch {
  ScaleSchedule schedule;
  Grid full;  // as StateShape
  int uncond_until = StateShape::kAllScales;
  Grid rope_grid;
  AttentionPlan plan;
  TokenOrder order;  // as StateShape
};

/// The VAE's grid that the codes are summed on.
Grid codes_grid(const InfinityConfig& config, const StateShape& shape);

/// Is there a scale with guidance?
bool guided(const std::vector<float>& cfg);

/// Returns the summed codes f32 [pictures, d, H, W], on the host.
Tensor walk(Infinity& model, Backend& backend, const PackedText& text, const WalkOptions& options);

}  // namespace sparvar
