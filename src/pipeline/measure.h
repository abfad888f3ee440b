// Times of a model of any geometry, with random weights: what a picture costs, scale by scale.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "sparvar/pipeline.h"

namespace sparvar {

struct MeasureOptions {
  std::string geometry;  // of src/weights/geometry.h
  PipelineOptions pipeline;
  AttentionPlan plan;
  int batch = 1;
  int repeat = 5;
  int text_tokens = 40;  // of each prompt
  std::function<void(const std::string& what)> on_progress;
};

/// Medians of warm runs, in seconds.
struct Measurement {
  std::string backend;
  std::vector<ScaleTiming> scales;
  double text = 0;          // what the transformer does with the texts' states; no text encoder
  double decode = 0;        // of all pictures of the batch
  double total = 0;         // from the texts' states to pixels on the host
  double first = 0;         // the first picture: programs are recorded and algorithms chosen
  double linear_flops = 0;  // multiply-adds times two of the linear layers of one total
  double product_rate = 0;  // FLOP/s of a large matrix product in the same process
  std::vector<ProductTime> products;
  std::int64_t parameters = 0;
  DeviceMemory memory;
  std::int64_t device_bytes = 0;  // taken of the GPU, everything together, after the runs
};

/// Throws as Pipeline::load and Pipeline::generate do.
Measurement measure_model(const MeasureOptions& options);

}  // namespace sparvar
