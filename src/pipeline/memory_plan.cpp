// What a run on the CPU will take of memory, from shapes alone.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attention/key_lists.h"
#include "backend/cpu/dnnl_support.h"
#include "core/parallel.h"
#include "pipeline/device.h"
#include "pipeline/job.h"
#include "pipeline/model_files.h"
#include "sparvar/pipeline.h"

namespace sparvar {
namespace {

/// The program, its libraries and their tables, and one thread's kernels; measured.
constexpr std::int64_t kProgram = 25'000'000;
constexpr std::int64_t kThread = 2'000'000;  // stack and kernel scratch that a thread touches

struct Model {
  explicit Model(const std::string& dir) : config(read_model_config(dir + "/config.json")), files(dir) {}
  ModelConfig config;
  ModelFiles files;
};

std::int64_t size_of(Precision precision) { return precision == Precision::f32 ? 4 : 2; }

/// Files are mapped and read once. oneDNN keeps weights in a layout of its own; where the file's type is another one,
/// as bf16 is where it cannot be multiplied, there is a converted copy before it.
std::int64_t weight_bytes(const ModelFiles& files, Precision precision) {
  const std::int64_t file_bytes = files.bytes();
  const std::int64_t parameters = files.parameters();
  const std::int64_t computed = parameters * (multiplies_bf16() ? size_of(precision) : 4);
  const bool converted = computed != file_bytes;
  return file_bytes + computed + (converted ? computed : 0);
}

/// What a plan's list makers hold at scale k beside the attention itself: column sums f32 [rows * heads, groups, keys],
/// statistics, and the rows that a residual is made of.
std::int64_t plan_bytes(const InfinityConfig& config, const AttentionPlan& plan, const ScaleSchedule& schedule, int k,
                        std::int64_t rows) {
  std::int64_t keys = 0, most = 0;
  for (int j = 0; j <= k; ++j) keys += schedule[static_cast<std::size_t>(j)].tokens();
  const Grid grid = schedule[static_cast<std::size_t>(k)];
  const std::int64_t lists = rows * config.num_heads;
  for (int layer = 0; layer < config.depth; ++layer) {
    const AttentionMethod& method = plan.method(layer, k);
    std::int64_t groups = 0, residual_rows = 0;
    if (const auto* probe = std::get_if<ProbeAttention>(&method)) {
      groups = group_tiles(grid, probe->group).count();
      residual_rows = grid.tokens() / (static_cast<std::int64_t>(probe->stride) * probe->stride);
    } else if (const auto* cs4a = std::get_if<Cs4aAttention>(&method); cs4a != nullptr && cs4a->decision_scale == k) {
      groups = group_tiles(grid, cs4a->group).count();
      residual_rows = grid.tokens();
    } else {
      continue;
    }
    const std::int64_t statistics = 8 * lists * grid.tokens();
    most = std::max(most, 4 * lists * groups * keys + statistics + 12 * rows * residual_rows * config.embed_dim);
  }
  return most;
}

/// What CS4A keeps of its decision scales until the end, all layers: the residual f32 [rows, n, C].
std::int64_t decision_bytes(const InfinityConfig& config, const AttentionPlan& plan, const StateShape& shape) {
  std::int64_t bytes = 0;
  for (int layer = 0; layer < config.depth; ++layer)
    for (int k = 0; k < static_cast<int>(shape.schedule.size()); ++k) {
      const auto* cs4a = std::get_if<Cs4aAttention>(&plan.method(layer, k));
      if (cs4a == nullptr || cs4a->decision_scale != k || !cs4a->residual) continue;
      bytes +=
          std::int64_t{4} * shape.rows_at(k) * shape.schedule[static_cast<std::size_t>(k)].tokens() * config.embed_dim;
    }
  return bytes;
}

struct Walked {
  std::int64_t cache = 0, activations = 0;
};

/// The last scale of all is the largest. Bytes follow src/models/infinity: per row and channel the residual stream (4),
/// the qkv product (12, f32), its queries, the attention's output and the normed input (3 compute numbers), the hidden
/// layer of the feed-forward, and a result that waits to be added.
Walked walk_bytes(const InfinityConfig& config, const Job& job, const AttentionPlan& plan, Precision precision) {
  const StateShape shape = job.state_shape(job.batch, 0, {});
  const std::int64_t s = size_of(precision);
  const std::int64_t width = config.embed_dim;
  const int scales = static_cast<int>(shape.schedule.size());
  std::int64_t all = 0, before_until = 0;
  Walked out;
  for (int k = 0; k < scales; ++k) {
    const std::int64_t tokens = shape.schedule[static_cast<std::size_t>(k)].tokens();
    const std::int64_t rows = shape.rows_at(k) * tokens;
    const std::int64_t per_row = width * (4 + 12 + 4 * s) + config.ffn_dim() * s + 4 * 3 * config.bits();
    const std::int64_t lists = plan_bytes(config, plan, shape.schedule, k, shape.rows_at(k));
    out.activations = std::max(out.activations, rows * per_row + lists);
    all += tokens;
    if (shape.guided_at(k)) before_until += tokens;
  }
  out.activations += decision_bytes(config, plan, shape);
  if (plan.pruning && plan.pruning->first_scale <= scales)  // the output of the scale before
    out.activations += std::int64_t{4} * shape.rows_at(plan.pruning->first_scale - 1) *
                       shape.schedule[static_cast<std::size_t>(plan.pruning->first_scale) - 1].tokens() * width;
  const std::int64_t last = shape.schedule.back().tokens();
  const std::int64_t kept = all - last;
  const std::int64_t rows = shape.rows_at(scales - 1);
  const std::int64_t token = 2 * width * s;  // keys and values of one layer
  out.cache = config.depth * rows * kept * token + rows * all * token;
  if (shape.guided && shape.uncond_until < scales)  // the caches of both halves, before the change
    out.cache += config.depth * shape.rows_at(0) * before_until * token;
  return out;
}

/// The decoder's widest moment: at each resolution the map, its norm, the convolution's result and the one before.
std::int64_t decoder_bytes(const VaeConfig& config, const InfinityConfig& transformer, const Job& job,
                           Precision precision) {
  const int step = transformer.apply_spatial_patchify ? 2 : 1;
  const Grid grid = job.schedule.back();
  const auto levels = static_cast<int>(config.ch_mult.size());
  std::int64_t most = 0;
  for (int level = 0; level < levels; ++level) {
    const int scale = step << (levels - 1 - level);
    const std::int64_t pixels = static_cast<std::int64_t>(grid.h) * scale * grid.w * scale;
    const std::int64_t channels = static_cast<std::int64_t>(config.ch) *
                                  std::max(config.ch_mult[static_cast<std::size_t>(level)],
                                           config.ch_mult[static_cast<std::size_t>(std::min(level + 1, levels - 1))]);
    most = std::max(most, pixels * channels);
  }
  return 4 * most * size_of(precision);
}

std::int64_t picture_bytes(const ModelConfig& config, const Job& job) {
  const std::int64_t side = config.vae.patch_size * (config.transformer.apply_spatial_patchify ? 2 : 1);
  return job.schedule.back().tokens() * side * side * 3;
}

MemoryPlan planned(const Model& model, const PipelineOptions& pipeline, const GenerateOptions& options) {
  check_weight_format(pipeline);
  const Job job = checked_job(model.config, options, model.files.levels());
  const Walked walked = walk_bytes(model.config.transformer, job, options.plan, pipeline.precision);
  MemoryPlan plan;
  plan.precision = pipeline.precision;
  plan.batch = static_cast<int>(job.batch);
  plan.program = kProgram + kThread * (pipeline.threads > 0 ? pipeline.threads : usable_threads());
  plan.weights = weight_bytes(model.files, pipeline.precision);
  plan.cache = walked.cache;
  plan.activations = walked.activations;
  plan.decoder = decoder_bytes(model.config.vae, model.config.transformer, job, pipeline.precision);
  plan.pictures = (job.pictures + 1) * picture_bytes(model.config, job);
  const std::int64_t walking = plan.cache + plan.activations + (options.on_preview ? plan.decoder : 0);
  plan.peak = plan.program + plan.weights + plan.pictures + std::max(walking, plan.decoder);
  return plan;
}

std::string megabytes(std::int64_t bytes) {
  return fmt::format("{:.0f}M", std::ceil(static_cast<double>(bytes) / 1e6));
}

/// What else could be asked for, with what it would take.
std::string advice(const Model& model, const PipelineOptions& pipeline, const GenerateOptions& options,
                   std::int64_t bytes) {
  std::string out;
  const auto offer = [&](const std::string& flag, const PipelineOptions& p, const GenerateOptions& o) {
    try {
      const std::int64_t peak = planned(model, p, o).peak;
      if (peak <= bytes) out += fmt::format("{}{} ({})", out.empty() ? "" : ", ", flag, megabytes(peak));
    } catch (const Error&) {  // this model has no such size
    }
  };
  PipelineOptions bf16 = pipeline;
  bf16.precision = Precision::bf16;
  if (pipeline.precision == Precision::f32) offer("--dtype bf16", bf16, options);
  for (const char* size : {"0.60M", "0.25M", "0.06M"}) {
    GenerateOptions smaller = options;
    smaller.size = size;
    smaller.cfg.resize(std::min<std::size_t>(smaller.cfg.size(), 1));
    smaller.tau.resize(std::min<std::size_t>(smaller.tau.size(), 1));
    smaller.uncond_until = -1;
    offer(fmt::format("--size {}", size), pipeline, smaller);
    if (!out.empty()) break;
  }
  GenerateOptions unguided = options;
  unguided.cfg = {1.0F};
  offer("--cfg 1", pipeline, unguided);
  return out;
}

}  // namespace

MemoryPlan plan_memory(const PipelineOptions& pipeline, const GenerateOptions& options) {
  return planned(Model(pipeline.model_dir.empty() ? bundled_model_dir() : pipeline.model_dir), pipeline, options);
}

MemoryPlan fit_memory(PipelineOptions& pipeline, GenerateOptions& options, std::int64_t bytes, bool any_precision) {
  const Model model(pipeline.model_dir.empty() ? bundled_model_dir() : pipeline.model_dir);
  MemoryPlan plan = planned(model, pipeline, options);
  GenerateOptions trial = options;
  const auto shrink = [&](const PipelineOptions& tried) {
    plan = planned(model, tried, options);
    trial = options;
    while (plan.peak > bytes && plan.batch > 1) {
      trial.batch = plan.batch - 1;
      plan = planned(model, tried, trial);
    }
    return plan.peak <= bytes;
  };
  PipelineOptions bf16 = pipeline;
  bf16.precision = Precision::bf16;
  const bool fits = shrink(pipeline) || (any_precision && pipeline.precision == Precision::f32 && shrink(bf16));
  if (!fits) {
    const std::string others = advice(model, pipeline, trial, bytes);
    throw Error(ErrorKind::usage,
                fmt::format("max-memory: one picture in {} needs {}, and {} are allowed; {}",
                            plan.precision == Precision::f32 ? "f32" : "bf16", megabytes(plan.peak), megabytes(bytes),
                            others.empty() ? "nothing smaller fits either" : "what fits: " + others));
  }
  options.batch = plan.batch;
  pipeline.precision = plan.precision;
  return plan;
}

}  // namespace sparvar
