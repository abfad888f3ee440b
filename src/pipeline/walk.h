// The walk up the scales: logits -> bits -> summed codes -> the words of the next scale.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "models/infinity/infinity.h"
#include "pipeline/sampling.h"
#include "sparvar/pipeline.h"

namespace sparvar {

struct WalkOptions {
  ScaleSchedule schedule;
  Grid rope_grid;
  AttentionPlan plan;
  std::vector<float> cfg;  // per scale
  std::vector<float> tau;
  Sampling sampling;
  std::uint64_t first_picture = 0;
  /// Sees every tensor the golden fixtures name, bits, summed codes and next features included.
  Observer observe;
  /// Where given, its bits U8 [B, n, bits] are used instead of the sampled ones (teacher forcing).
  std::function<Tensor(int scale)> forced_bits;
  std::function<void(const ScaleTiming&, int scale)> on_scale;
  const std::atomic<bool>* cancel = nullptr;
};

/// Returns the summed codes f32 [pictures, d, H, W] on the VAE grid of the last scale.
Tensor walk(Infinity& model, const PackedText& text, const WalkOptions& options);

}  // namespace sparvar
