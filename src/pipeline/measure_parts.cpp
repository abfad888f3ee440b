// Times of whole pictures of a loaded model, and of attention alone.
#include <fmt/format.h>

#include <algorithm>

#include "core/clock.h"
#include "models/attention_runner.h"
#include "pipeline/measure.h"
#include "pipeline/median.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

AttentionArgs random_args(Backend& backend, const AttentionCase& of, int queries, int keys) {
  const DType type = backend.compute_type();
  const std::int64_t b = of.batch, h = of.heads, d = of.dim;
  return {.q = backend.random(type, {b, h, queries, d}, 1, 1.0F),
          .k = backend.random(type, {b, h, keys, d}, 2, 0.1F),
          .v = backend.random(type, {b, h, keys, d}, 3, 1.0F),
          .out = Tensor::empty(type, {b, queries, h, d}),
          .scale = 1.0F,
          .statistics = {}};
}

}  // namespace

PictureTimes measure_pictures(Pipeline& pipeline, const GenerateOptions& options, int repeat) {
  PictureTimes times;
  times.first = pipeline.generate(options).total_seconds;
  std::vector<GenerateResult> runs;
  for (int r = 0; r < repeat; ++r) {
    runs.push_back(pipeline.generate(options));
    runs.back().pictures.clear();
  }
  const auto middle = [&](auto value) { return median_of(runs, value); };
  times.text = middle([](const GenerateResult& run) { return run.text_seconds; });
  times.decode = middle([](const GenerateResult& run) { return run.decode_seconds; });
  times.total = middle([](const GenerateResult& run) { return run.total_seconds; });
  times.scales = runs.front().scales;
  for (std::size_t k = 0; k < times.scales.size(); ++k) {
    times.scales[k].seconds = middle([k](const GenerateResult& run) { return run.scales[k].seconds; });
    times.scales[k].attention_seconds =
        middle([k](const GenerateResult& run) { return run.scales[k].attention_seconds; });
  }
  return times;
}

AttentionTime measure_attention(Backend& backend, const AttentionCase& of, int repeat) {
  if (of.plan.pruning)
    throw Error(ErrorKind::usage, fmt::format("plan {} prunes tokens, which saves more than attention; measure whole "
                                              "pictures: bench model",
                                              of.plan.name));
  AttentionTime time;
  std::vector<int> keys;
  for (int k = 0, sum = 0; k <= of.scale; ++k) keys.push_back(sum += of.schedule[k].tokens());
  time.queries = of.schedule[of.scale].tokens();
  time.keys = keys.back();
  AttentionRunner runner(backend, of.plan, of.schedule, 1);
  const auto* cs4a = std::get_if<Cs4aAttention>(&of.plan.method(0, of.scale));
  if (cs4a != nullptr && cs4a->decision_scale < of.scale) {
    const int decision = cs4a->decision_scale;
    AttentionArgs args = random_args(backend, of, of.schedule[decision].tokens(), keys[decision]);
    runner.run(0, decision, args);
  }
  AttentionArgs args = random_args(backend, of, time.queries, time.keys);
  std::vector<double> seconds;
  for (int r = 0; r <= repeat; ++r) {  // the first is a warm-up
    runner.start(of.scale);
    const auto start = Clock::now();
    runner.run(0, of.scale, args);
    if (r > 0) seconds.push_back(seconds_since(start));
  }
  time.seconds = median(seconds);
  time.share = runner.share_of_pairs(of.scale);
  time.flops = 4.0 * of.batch * of.heads * of.dim * time.share * time.queries * time.keys;
  return time;
}

}  // namespace sparvar
