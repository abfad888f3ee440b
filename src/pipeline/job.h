// The options of a run, checked against the model: what is drawn, and how.
#pragma once

#include <vector>

#include "models/infinity/infinity.h"
#include "pipeline/picture_shape.h"
#include "sparvar/pipeline.h"

namespace sparvar {

struct Job {
  ScaleSchedule schedule;  // all scales of the picture
  ScaleSchedule drawn;     // without the skipped ones
  Grid rope_grid;
  std::vector<float> cfg, tau;  // per drawn scale; cfg is 1 from uncond_until on
  int uncond_until = 0;         // scales with guidance; 0: none
  std::int64_t pictures = 0;    // in all
  std::int64_t batch = 1;

  StateShape state_shape(std::int64_t count, std::int64_t text_tokens, const AttentionPlan& plan) const;
};

/// `levels`: as picture_shape. Throws Error(usage) naming the option, what was expected and found.
Job checked_job(const ModelConfig& config, const GenerateOptions& options, int levels);

/// "sparvar: scales 10 to 12 sparse (probe); dense before, where sparsity costs more than it saves".
std::string attention_path(const AttentionPlan& plan, int scales, int layers, bool gpu);

}  // namespace sparvar
