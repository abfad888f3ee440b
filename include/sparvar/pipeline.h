// Prompts in, pictures out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sparvar/attention_plan.h"
#include "sparvar/error.h"
#include "sparvar/image.h"
#include "sparvar/precision.h"
#include "sparvar/schedule.h"

namespace sparvar {

struct PipelineOptions {
  std::string model_dir;  // empty: the bundled model
  Precision precision = Precision::bf16;
  int threads = 0;              // of the CPU; 0: all cores
  std::string device = "auto";  // cpu, cuda, cuda:N; auto: a GPU where there is a usable one
};

/// Memory a GPU holds for a model, in bytes. All zero on the CPU, which plans none.
struct DeviceMemory {
  std::int64_t weights = 0;
  std::int64_t working = 0;  // KV cache and activations of one picture, at their largest
  std::int64_t free = 0;     // before the model was loaded
  std::int64_t total = 0;
};

/// What is known about a loaded model and its machine, for people and programs.
struct ModelInfo {
  std::string model_dir;
  std::string architecture;  // "infinity"
  int layers = 0, width = 0, heads = 0, head_dim = 0, bits = 0;
  std::int64_t transformer_parameters = 0, vae_parameters = 0, text_parameters = 0;
  ScaleSchedule schedule;  // token grids
  int picture_height = 0, picture_width = 0;
  std::vector<float> default_cfg, default_tau;
  std::string backend;  // "cpu, avx512-bf16, 2 threads"
  bool on_gpu = false;
  std::string why_no_gpu;  // where the device is auto and the CPU was taken
  DeviceMemory memory;
};

struct Progress {
  enum class Stage { load, text, scale, decode } stage = Stage::text;
  int done = 0;   // scales finished
  int total = 0;  // scales in all
  Grid grid;      // of the scale just finished
  double seconds = 0;
};

struct GenerateOptions {
  std::vector<std::string> prompts;
  int pictures_per_prompt = 1;
  std::uint64_t seed = 0;
  std::vector<float> cfg;  // one value, or one per scale; empty: the model's default. 1: no guidance
  std::vector<float> tau;
  int top_k = 0;        // 1: arg-max; 0 or >= 2: no effect on bits
  float top_p = 0.97F;  // a bit whose rarer value has p <= 1 - top_p is deterministic
  bool greedy = false;  // arg-max of every bit
  AttentionPlan plan;   // default: dense
  int batch = 0;        // pictures drawn together; 0: as many as keep memory near that of one 1M picture
  std::function<void(const Progress&)> on_progress;
  const std::atomic<bool>* cancel = nullptr;  // seen within a second
};

struct ScaleTiming {
  Grid grid;
  double seconds = 0;
  double attention_seconds = 0;  // 0 on a GPU, which runs a scale as one recorded program
  double share_of_pairs = 1;     // of query-key pairs computed, mean over layers
};

struct Picture {
  Image image;
  std::string prompt;
  int prompt_index = 0;
  int picture_index = 0;  // among the pictures of this prompt
};

struct GenerateResult {
  std::vector<Picture> pictures;  // prompt 0's pictures, then prompt 1's, ...
  double text_seconds = 0, decode_seconds = 0, total_seconds = 0;
  std::vector<ScaleTiming> scales;  // summed over batches
};

/// A loaded model. Not for use from two threads at once.
class Pipeline {
 public:
  /// Throws Error where the folder is not a model, there is no such device, or the model does not fit its memory.
  static Pipeline load(const PipelineOptions& options);
  Pipeline(Pipeline&&) noexcept;
  Pipeline& operator=(Pipeline&&) noexcept;
  ~Pipeline();

  const ModelInfo& info() const;
  GenerateResult generate(const GenerateOptions& options);

 private:
  struct Impl;
  explicit Pipeline(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// The folder of the bundled model: next to the program, in the source tree, or where it was installed; SPARVAR_MODEL
/// overrides.
std::string bundled_model_dir();

}  // namespace sparvar
