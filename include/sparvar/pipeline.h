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

struct QueryTiles;  // src/attention/key_lists.h: not a part of the stable interface
struct KeyLists;
struct AttentionArgs;  // src/backend/backend.h: nor this

/// What was just finished. Stage::load comes with bytes, the others with scales.
struct Progress {
  enum class Stage { load, text, scale, decode } stage = Stage::text;
  int done = 0;   // scales finished
  int total = 0;  // scales in all
  Grid grid{};    // of the scale just finished
  double seconds = 0;
  std::int64_t bytes_done = 0, bytes_total = 0;  // of the weight files
};

struct PipelineOptions {
  std::string model_dir;  // empty: the bundled model
  Precision precision = Precision::bf16;
  int threads = 0;                                     // of the CPU; 0: all cores
  std::string device = "auto";                         // cpu, cuda, cuda:N; auto: a GPU where there is a usable one
  std::function<void(const Progress&)> on_progress{};  // of loading
  WeightFormat weights = WeightFormat::as_stored;
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
  std::string model_hash;    // of the folder's files, from samples of them: docs/model-format.md
  std::string architecture;  // "infinity"
  int layers = 0, width = 0, heads = 0, head_dim = 0, bits = 0;
  std::int64_t transformer_parameters = 0, vae_parameters = 0, text_parameters = 0;
  ScaleSchedule schedule;  // token grids
  int picture_height = 0, picture_width = 0;
  std::vector<float> default_cfg, default_tau;
  std::string backend;                         // "cpu, avx512-bf16, 2 threads"
  std::string why_backend;                     // why these instructions; empty on a GPU
  WeightFormat weights = WeightFormat::plain;  // never as_stored
  bool on_gpu = false;
  std::string why_no_gpu;  // where the device is auto and the CPU was taken
  DeviceMemory memory;
};

struct Picture {
  Image image;
  std::string prompt;
  int prompt_index = 0;
  int picture_index = 0;  // among the pictures of this prompt
};

struct GenerateOptions {
  std::vector<std::string> prompts;
  int pictures_per_prompt = 1;
  std::uint64_t seed = 0;
  /// What the random numbers of the first picture are counted by; the next ones follow. The picture that a run drew as
  /// number N is drawn alone with the same seed and first_picture N.
  std::uint64_t first_picture = 0;
  /// "W:H", width to height: 1:1, 4:5, 3:4, 2:3, 4:7, 1:2, 2:5, 1:3 or the other way round; a ratio within 2 % is taken
  /// for it (16:9 for 7:4). Empty: the model's.
  std::string aspect;
  /// 0.06M, 0.25M, 0.60M or 1M: the first 7, 10, 12 or 13 scales of the ratio's schedule. The names are megapixels of a
  /// model with 16 pixels a token. Empty: the model's.
  std::string size;
  int skip_scales = 0;  // 0 to 2: the last scales are left out; the codes so far are decoded at full size
  /// Guidance ends at this scale: from it on the unconditional half is not computed. 0: no guidance; -1: all scales.
  int uncond_until = -1;
  std::vector<float> cfg;  // one value, or one per scale; empty: the model's default. 1: no guidance
  std::vector<float> tau;
  int top_k = 0;        // 1: arg-max; 0 or >= 2: no effect on bits
  float top_p = 0.97F;  // a bit whose rarer value has p <= 1 - top_p is deterministic
  bool greedy = false;  // arg-max of every bit
  AttentionPlan plan;   // default: dense
  int batch = 0;        // pictures drawn together; 0: as many as keep memory near that of one 1M picture
  /// Gets the picture of the scales so far after each scale from `preview_from` on, but the last; on_progress of that
  /// scale comes after it. Each takes a run of the decoder; on a GPU, memory for it beside the KV cache.
  std::function<void(const Picture&, int scale)> on_preview;
  int preview_from = 3;
  std::function<void(const Progress&)> on_progress;
  const std::atomic<bool>* cancel = nullptr;  // seen within a second
  /// For tools of this repository: every sparse (layer, scale) as it is executed, on the CPU.
  std::function<void(int layer, int scale, const QueryTiles&, const KeyLists&)> on_lists;
  /// For tools of this repository: queries and keys of every (layer, scale) before attention runs; of a GPU's, copies
  /// of the first batch entry.
  std::function<void(int layer, int scale, const AttentionArgs&)> on_attention;
};

struct ScaleTiming {
  Grid grid{};
  double seconds = 0;
  double cold_seconds = 0;       // the part of it spent in cold batches
  double attention_seconds = 0;  // 0 on a GPU, which runs a scale as one recorded program
  double share_of_pairs = 1;     // of query-key pairs computed, mean over layers
};

struct GenerateResult {
  std::vector<Picture> pictures;  // prompt 0's pictures, then prompt 1's, ...
  double text_seconds = 0, decode_seconds = 0, preview_seconds = 0, total_seconds = 0;
  double cold_decode_seconds = 0;   // the part of decode_seconds spent in cold batches
  std::vector<ScaleTiming> scales;  // of the scales drawn, summed over batches
  ScaleSchedule schedule;           // with the scales that were skipped
  int batches = 0;
  /// Batches of a shape this pipeline had not drawn before: weights are packed and algorithms chosen in them.
  int cold_batches = 0;
  int recordings = 0;          // programs a GPU recorded in this run: none where it knows the shapes and text lengths
  int uncond_until = 0;        // scales that ran with an unconditional half
  std::string attention_path;  // which attention ran where, and why, in one line
};

/// Memory of a run on the CPU in bytes, estimated before anything is loaded (docs/architecture.md: within 25 %).
struct MemoryPlan {
  std::int64_t program = 0;      // the program and its libraries
  std::int64_t weights = 0;      // files as far as they are mapped, and packed copies
  std::int64_t cache = 0;        // keys and values of all scales
  std::int64_t activations = 0;  // of the largest scale
  std::int64_t decoder = 0;      // feature maps of one picture
  std::int64_t pictures = 0;     // finished pictures that are held until the last is drawn
  std::int64_t peak = 0;         // cache and activations are gone when the decoder runs, but for previews
  int batch = 1;
  Precision precision = Precision::bf16;
};

/// What the files of a model folder say (empty: the bundled model): ModelInfo without what depends on the device.
/// Throws Error(input) as Pipeline::load does.
ModelInfo model_outline(const std::string& model_dir);

/// plan.json of a model folder (empty: the bundled model): the attention plan its makers chose for it; nothing where
/// the folder has none. Throws Error(input) where the file is not a plan, or not one of this model.
std::optional<AttentionPlan> model_plan(const std::string& model_dir);
/// The plan of a picture of `scales` scales where none is named. plan.json of the model's folder, for pictures of as
/// many scales as the model has (a plan counts scales from the first, so it is not that of other sizes); otherwise the
/// preset sparvar on the CPU, dense on a GPU. Throws as model_plan does.
AttentionPlan default_plan(const ModelInfo& model, int scales);

/// The plan of Pipeline::load(pipeline) and generate(options) on the CPU. Reads config.json and the headers of the
/// weight files. Throws Error as these two do.
MemoryPlan plan_memory(const PipelineOptions& pipeline, const GenerateOptions& options);
/// Chooses options.batch, and where `any_precision` also pipeline.precision, so that the peak is at most `bytes`: the
/// largest batch up to the one asked for. Throws Error(usage) that says what would fit where nothing does.
MemoryPlan fit_memory(PipelineOptions& pipeline, GenerateOptions& options, std::int64_t bytes, bool any_precision);

/// The grids of a picture; `aspect` and `size` as in GenerateOptions, `model_dir` as in PipelineOptions. Throws
/// Error(usage) naming the nearest where the model has no such ratio or size.
ScaleSchedule picture_schedule(const std::string& model_dir, const std::string& aspect, const std::string& size);

/// A loaded model. Not for use from two threads at once.
class Pipeline {
 public:
  /// Throws Error where the folder is not a model, there is no such device, or the model does not fit its memory.
  static Pipeline load(const PipelineOptions& options);
  Pipeline(Pipeline&&) noexcept;
  Pipeline& operator=(Pipeline&&) noexcept;
  ~Pipeline();

  const ModelInfo& info() const;
  /// Throws Error(usage) for options that are impossible, Error(cancelled), Error(system) where memory is out.
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
