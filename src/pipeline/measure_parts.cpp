// Times of whole pictures of a loaded model.
#include "pipeline/measure.h"
#include "pipeline/median.h"

namespace sparvar {

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

}  // namespace sparvar
