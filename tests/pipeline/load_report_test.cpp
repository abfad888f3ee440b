// What is told of loading: few reports, and one that it is done.
#include "pipeline/load_report.h"

#include <gtest/gtest.h>

#include <vector>

#include "models/random_weights.h"
#include "support.h"

namespace sparvar {
namespace {

std::vector<Progress> reports(std::int64_t total, const std::vector<std::int64_t>& read) {
  std::vector<Progress> out;
  LoadReport report([&](const Progress& progress) { out.push_back(progress); }, total);
  for (const std::int64_t bytes : read) report.add(bytes);
  report.finish();
  return out;
}

TEST(LoadReport, TellsAtMostAHundredTimesAndOnceThatItIsDone) {
  for (const std::int64_t piece :
       {1, 7, 30, 400}) {  // of files and of estimates, which are not what is read in the end
    const std::vector<Progress> told = reports(10000, std::vector<std::int64_t>(12000 / piece, piece));
    EXPECT_GT(told.size(), 10U) << piece;
    EXPECT_LE(told.size(), 101U) << piece;
    for (std::size_t i = 0; i < told.size(); ++i) {
      EXPECT_EQ(told[i].stage, Progress::Stage::load);
      EXPECT_EQ(told[i].bytes_total, 10000);
      EXPECT_EQ(told[i].bytes_done == 10000, i + 1 == told.size()) << piece << ", report " << i;
    }
  }
}

TEST(LoadReport, AnEmptyModelIsDoneAtOnce) {
  const std::vector<Progress> told = reports(0, {});
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(told[0].bytes_done, told[0].bytes_total);
}

TEST(LoadReport, RandomWeightsTellTheirBytes) {
  const auto backend = make_cpu_backend({.compute = DType::bf16, .threads = 1});
  const ModelConfig config = read_model_config(testing::models_dir() + "/emoji/config.json");
  std::int64_t bytes = 0;
  const RandomWeights weights(config, *backend, [&](std::int64_t more) { bytes += more; });
  const std::int64_t before = bytes;
  EXPECT_EQ(before, 4 * weights.parameters()) << "tables that stay on the host are f32";
  const std::int64_t parameters = weights.parameters();
  EXPECT_EQ(weights.get("large.weight", {2048, 1024}).dtype(), DType::bf16);
  EXPECT_EQ(bytes - before, 2 * 2048 * 1024);
  EXPECT_EQ(weights.parameters() - parameters, 2048 * 1024);
}

}  // namespace
}  // namespace sparvar
