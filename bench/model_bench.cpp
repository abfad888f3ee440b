// Times whole pictures of a model: cold first picture, then the median of warm ones, per stage and scale; peak memory.
// model_bench [--attention sparvar] [--dtype bf16] [--threads 2] [--repeat 3] [--model DIR] [--prompt TEXT]
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sparvar/pipeline.h"

namespace {

using namespace sparvar;

struct Options {
  PipelineOptions pipeline;
  std::string attention = "sparvar";
  std::string prompt = "grinning face, noto style";
  int repeat = 3;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--attention")
      o.attention = value;
    else if (name == "--dtype")
      o.pipeline.precision = value == "f32" ? Precision::f32 : Precision::bf16;
    else if (name == "--threads")
      o.pipeline.threads = std::stoi(value);
    else if (name == "--repeat")
      o.repeat = std::stoi(value);
    else if (name == "--model")
      o.pipeline.model_dir = value;
    else if (name == "--prompt")
      o.prompt = value;
    else
      throw std::runtime_error("unknown option " + name);
  }
  return o;
}

nlohmann::json times(const GenerateResult& r) {
  nlohmann::json scales = nlohmann::json::array();
  for (const ScaleTiming& s : r.scales)
    scales.push_back({{"h", s.grid.h},
                      {"w", s.grid.w},
                      {"seconds", s.seconds},
                      {"attention_seconds", s.attention_seconds},
                      {"share_of_pairs", s.share_of_pairs}});
  return {{"total", r.total_seconds}, {"text", r.text_seconds}, {"decode", r.decode_seconds}, {"scales", scales}};
}

int run(const Options& o) {
  Pipeline pipeline = Pipeline::load(o.pipeline);
  GenerateOptions generate;
  generate.prompts = {o.prompt};
  generate.seed = 7;
  generate.plan =
      AttentionPlan::preset(o.attention, pipeline.info().layers, static_cast<int>(pipeline.info().schedule.size()));
  const GenerateResult cold = pipeline.generate(generate);
  std::vector<GenerateResult> warm;
  warm.reserve(o.repeat);
  for (int r = 0; r < o.repeat; ++r) warm.push_back(pipeline.generate(generate));
  std::sort(warm.begin(), warm.end(), [](const auto& a, const auto& b) { return a.total_seconds < b.total_seconds; });
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  fmt::print("{}\n", nlohmann::json({{"attention", o.attention},
                                     {"dtype", o.pipeline.precision == Precision::f32 ? "f32" : "bf16"},
                                     {"backend", pipeline.info().backend},
                                     {"cold", times(cold)},
                                     {"warm", times(warm[warm.size() / 2])},
                                     {"repeat", o.repeat},
                                     {"peak_mib", static_cast<double>(usage.ru_maxrss) / 1024}})
                         .dump());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "model_bench: %s\n", error.what());
    return 1;
  }
}
