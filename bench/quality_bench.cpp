// Sparse pictures against dense ones of the same seed: PSNR, SSIM, pairs computed, time of the scales.
// quality_bench [--plans dense,csla,FILE.json,...] [--prompts N] [--threads 2] [--dtype bf16] [--json]
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "sparvar/pipeline.h"

namespace {

using namespace sparvar;

const std::vector<std::string> kPrompts = {"grinning face, noto style",
                                           "a red apple, 3d style",
                                           "flag: Japan, twemoji style",
                                           "dog face, noto style",
                                           "rocket, fluent flat style",
                                           "red heart, noto style",
                                           "woman health worker, noto style",
                                           "slice of pizza, 3d style",
                                           "snowman, twemoji style",
                                           "house with garden, noto style",
                                           "octopus, 3d style",
                                           "alarm clock, fluent flat style"};

struct Row {
  std::string name;
  double psnr_sum = 0, psnr_worst = 1e9, ssim_sum = 0, seconds = 0, sparse_pairs = 0, all_pairs = 0;
};

AttentionPlan plan_of(const std::string& name, const ModelInfo& info) {
  if (name.ends_with(".json")) return AttentionPlan::from_file(name);
  return AttentionPlan::preset(name, info.layers, static_cast<int>(info.schedule.size()));
}

/// Pairs of the last three scales, where the plans are sparse.
void count_pairs(const GenerateResult& result, Row& row) {
  double keys = 0;
  for (std::size_t k = 0; k < result.scales.size(); ++k) {
    const double n = result.scales[k].grid.tokens();
    keys += n;
    if (k + 3 < result.scales.size()) continue;
    row.all_pairs += n * keys;
    row.sparse_pairs += n * keys * result.scales[k].share_of_pairs;
  }
}

int run(const std::vector<std::string>& plans, int prompts, const PipelineOptions& options, bool json) {
  Pipeline pipeline = Pipeline::load(options);
  std::vector<Row> rows;
  rows.reserve(plans.size());
  for (const std::string& plan : plans) rows.push_back({plan});
  for (int p = 0; p < prompts; ++p) {
    GenerateOptions generate;
    generate.prompts = {kPrompts[p % kPrompts.size()]};
    generate.seed = 1000 + p;
    const Picture dense = pipeline.generate(generate).pictures[0];
    for (Row& row : rows) {
      generate.plan = plan_of(row.name, pipeline.info());
      const GenerateResult result = pipeline.generate(generate);
      const double db = std::min(psnr(result.pictures[0].image, dense.image), 99.0);
      row.psnr_sum += db;
      row.psnr_worst = std::min(row.psnr_worst, db);
      row.ssim_sum += ssim(result.pictures[0].image, dense.image);
      for (const ScaleTiming& s : result.scales) row.seconds += s.seconds;
      count_pairs(result, row);
    }
  }
  nlohmann::json out = nlohmann::json::array();
  for (const Row& row : rows)
    out.push_back({{"plan", row.name},
                   {"psnr", row.psnr_sum / prompts},
                   {"worst_psnr", row.psnr_worst},
                   {"ssim", row.ssim_sum / prompts},
                   {"share", row.sparse_pairs / row.all_pairs},
                   {"seconds", row.seconds / prompts},
                   {"prompts", prompts}});
  if (json) {
    fmt::print("{}\n", out.dump());
    return 0;
  }
  for (const auto& row : out)
    fmt::print("{:28} {:5.1f} % of pairs  {:5.2f} dB (worst {:5.2f})  SSIM {:.3f}  {:.2f} s\n",
               row["plan"].get<std::string>(), 100 * row["share"].get<double>(), row["psnr"].get<double>(),
               row["worst_psnr"].get<double>(), row["ssim"].get<double>(), row["seconds"].get<double>());
  return 0;
}

int main_checked(int argc, char** argv) {
  std::string plans = "csla,csla-blocks,cs4a,cs4a-rows,published,probe,sparvar";
  PipelineOptions options;
  int prompts = 3;
  bool json = false;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--json") {
      json = true;
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error("no value for " + name);
    const std::string value = argv[++i];
    if (name == "--plans")
      plans = value;
    else if (name == "--prompts")
      prompts = std::stoi(value);
    else if (name == "--threads")
      options.threads = std::stoi(value);
    else if (name == "--dtype")
      options.precision = value == "f32" ? Precision::f32 : Precision::bf16;
    else
      throw std::runtime_error("unknown option " + name);
  }
  std::vector<std::string> names;
  std::istringstream list(plans);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return run(names, std::max(prompts, 1), options, json);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return main_checked(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "quality_bench: %s\n", error.what());
    return 1;
  }
}
