// Times of a model of any geometry, with random weights: what a picture costs, scale by scale.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "sparvar/pipeline.h"

namespace sparvar {

struct MeasureOptions {
  std::string geometry;  // of src/weights/geometry.h
  PipelineOptions pipeline;
  int text_tokens = 40;  // of each prompt
  std::function<void(const std::string& what)> on_progress;
  std::function<void(const Progress&)> on_load;  // the weights, where their bytes are planned: on a GPU
};

/// What is drawn, as GenerateOptions has it.
struct MeasuredRun {
  AttentionPlan plan;
  TokenOrder order;
  int batch = 1;
  int skip_scales = 0;
  int uncond_until = -1;
  int repeat = 5;
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
  std::vector<ProductTime> products;
  std::int64_t parameters = 0;
  DeviceMemory memory;
  std::int64_t device_bytes = 0;  // taken of the GPU, everything together, after the runs
};

/// A model of random weights, made at the first measurement and then kept.
class MeasuredModel {
 public:
  explicit MeasuredModel(MeasureOptions options);
  ~MeasuredModel();
  /// Throws where the device does not run the plan, or has not the memory (Error(usage), Error(system)), without having
  /// done anything; on the CPU, which plans nothing, the run itself throws.
  void require(const MeasuredRun& run);
  /// Throws as Pipeline::load and Pipeline::generate do.
  Measurement measure(const MeasuredRun& run);
  /// product_rate() of layers like the blocks'. Takes memory for good: after the measurements.
  double rate();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// FLOP/s of a square product, the ceiling of everything else: in the compute type, or narrow where the backend is made
/// for it.
double product_rate(Backend& backend);

/// Medians over `repeat` warm runs of one generation, in seconds.
struct PictureTimes {
  double first = 0;  // the cold run before them
  double text = 0, decode = 0, total = 0;
  std::vector<ScaleTiming> scales;
};
PictureTimes measure_pictures(Pipeline& pipeline, const GenerateOptions& options, int repeat);

}  // namespace sparvar
