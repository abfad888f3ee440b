// Sums over cases, pairs counted, the page and its plots.
#include "pipeline/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/evaluation_page.h"
#include "pipeline/svg_plot.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

CaseScores one_case(int index, double psnr, double ssim, double seconds, double dense, bool warm) {
  Score score;
  score.psnr = psnr;
  score.ssim = ssim;
  score.detail_error = 40 - psnr;
  score.seconds = seconds;
  score.dense_seconds = dense;
  score.pairs = 0.1 * (index + 1);
  score.all_pairs = 0.2 * (index + 1);
  score.warm = warm;
  return {index, {score}};
}

TEST(Summary, MeansWorstAndMediansOfWarmPictures) {
  const std::vector<CaseScores> cases = {one_case(0, 30, 0.9, 50, 50, false), one_case(1, 36, 0.8, 1, 4, true),
                                         one_case(2, 33, 1.0, 2, 4, true), one_case(3, kEqualPsnr, 1.0, 4, 4, true)};
  const VariantSummary s = summary_of(cases, 0);
  EXPECT_DOUBLE_EQ(s.psnr.mean, (30 + 36 + 33 + 100) / 4.0);
  EXPECT_EQ(s.psnr.worst, 30);
  EXPECT_NEAR(s.psnr.deviation, std::sqrt((19.75 * 19.75 + 13.75 * 13.75 + 16.75 * 16.75 + 50.25 * 50.25) / 3), 1e-9);
  EXPECT_EQ(s.ssim.worst, 0.8);
  EXPECT_EQ(s.detail_error.worst, 10) << "the largest error is the worst";
  EXPECT_EQ(s.seconds, 2);
  EXPECT_EQ(s.speed_up, 2);
  EXPECT_DOUBLE_EQ(s.pairs, 0.25);
  EXPECT_DOUBLE_EQ(s.all_pairs, 0.5);
  EXPECT_EQ(s.equal, 1);
  EXPECT_EQ(s.worst, (std::vector<int>{0, 2, 1, 3}));
  EXPECT_EQ(summary_of({cases[0]}, 0).seconds, 50) << "where nothing is warm, cold times are all there is";
  EXPECT_THROW(summary_of({}, 0), Error);
}

TEST(PairsComputed, CountsSkippedScalesAndTheHalfWithoutGuidance) {
  GenerateResult dense;
  dense.schedule = {{1, 1}, {2, 2}, {3, 3}};
  dense.scales = {{.grid = {1, 1}}, {.grid = {2, 2}}, {.grid = {3, 3}}};
  dense.uncond_until = 3;
  GenerateResult sparse = dense;
  sparse.scales[2].share_of_pairs = 0.25;
  const double pairs[] = {1, 4 * 5, 9 * 14};
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 2), 0.25);
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 0), (pairs[0] + pairs[1] + pairs[2] / 4) / (1 + 20 + 126));
  sparse.uncond_until = 2;
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 2), 0.125);
  sparse.scales.pop_back();
  EXPECT_EQ(pairs_computed(sparse, dense, 2), 0);
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 1), pairs[1] / (pairs[1] + pairs[2]));
}

TEST(PairsComputed, CountsWhatAPlanComputesBeyondDenseBefore) {
  GenerateResult dense;
  dense.schedule = {{1, 1}, {2, 2}, {3, 3}};
  dense.scales = {{.grid = {1, 1}}, {.grid = {2, 2}}, {.grid = {3, 3}}};
  dense.uncond_until = 3;
  GenerateResult sparse = dense;
  sparse.scales[1].share_of_pairs = 1.2;  // a decision scale with a residual
  sparse.scales[2].share_of_pairs = 0.25;
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 2), 0.25 + 0.2 * 20 / 126);
  sparse.scales[1].share_of_pairs = 0.5;  // what is saved there is not the last scales'
  EXPECT_DOUBLE_EQ(pairs_computed(sparse, dense, 2), 0.25);
}

TEST(KeepForPairs, ComputesTheShareThatIsAskedFor) {
  const ScaleSchedule schedule = {{1, 1}, {8, 8}, {16, 16}, {20, 24}, {32, 32}};
  for (const double share : {0.05, 0.2, 0.7}) {
    AttentionPlan plan;
    plan.pruning = TokenPruning{2, {keep_for_pairs(schedule, 2, share)}};
    double computed = 0, all = 0;
    for (int k = 2; k < 5; ++k) {
      double keys = 0, all_keys = 0;
      for (int j = 0; j <= k; ++j) {
        keys += plan.tokens_run(j, schedule[static_cast<std::size_t>(j)]);
        all_keys += schedule[static_cast<std::size_t>(j)].tokens();
      }
      computed += plan.tokens_run(k, schedule[static_cast<std::size_t>(k)]) * keys;
      all += schedule[static_cast<std::size_t>(k)].tokens() * all_keys;
    }
    EXPECT_NEAR(computed / all, share, 0.002) << share;
  }
  EXPECT_EQ(keep_for_pairs(schedule, 2, 1), 1);
  const double last = 1024.0 * (1 + 64 + 256 + 480 + 1024), all = last + 480.0 * 801 + 256.0 * 321;
  EXPECT_NEAR(keep_for_pairs(schedule, 4, 1 - 0.75 * last / all), 0.39, 0.02) << "of the last three, two run dense";
  const ScaleSchedule small = {{8, 8}, {10, 10}, {12, 12}};
  EXPECT_NEAR(keep_for_pairs(small, 2, (64.0 * 64 + 100 * 164 + 72 * 236) / (64 * 64 + 100 * 164 + 144 * 308)), 0.5,
              0.004);
  EXPECT_EQ(keep_for_pairs(schedule, 2, 1.3), 1) << "more than dense attention is not to be had";
}

TEST(OptionsOfCase, DrawTheNumberThatGenerateWouldDraw) {
  GenerateOptions all;
  all.prompts = {"a", "b", "c"};
  all.pictures_per_prompt = 2;
  all.first_picture = 10;
  const GenerateOptions one = options_of_case(all, 3);
  EXPECT_EQ(one.prompts, std::vector<std::string>{"b"});
  EXPECT_EQ(one.pictures_per_prompt, 1);
  EXPECT_EQ(one.first_picture, 13U);
}

TEST(Plot, TicksAreRoundAndCoverTheRange) {
  EXPECT_EQ(round_ticks(0.3, 9.1, 6), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  for (const auto& [low, high] : {std::pair{-3.7, 12.1}, {5.0, 5.0}, {0.0, 0.0}, {1e-4, 3e-4}, {29.9, 30.1}}) {
    const std::vector<double> ticks = round_ticks(low, high, 6);
    ASSERT_GE(ticks.size(), 2U);
    EXPECT_LE(ticks.size(), 9U);
    EXPECT_LE(ticks.front(), low + 1e-12);
    EXPECT_GE(ticks.back(), high - 1e-12);
  }
}

TEST(Plot, LeavesOutWhatIsNotANumberAndEscapesNames) {
  const std::string svg =
      scatter_plot({{"a<b", 1, 2, 1, 2}, {"gone", NAN, 2, 1, 2}, {"c", 3, 4, 3, 4}}, {"t", "x", "y"});
  EXPECT_NE(svg.find("a&lt;b"), std::string::npos);
  EXPECT_EQ(svg.find("a<b"), std::string::npos);
  EXPECT_EQ(svg.find("gone"), std::string::npos);
  EXPECT_NE(svg.find(plot_colour(2)), std::string::npos) << "a point keeps its colour where others are left out";
  EXPECT_NE(scatter_plot({}, {"t", "x", "y"}).find("nothing to plot"), std::string::npos);
}

TEST(Page, HoldsItsPicturesAndIsClosed) {
  EXPECT_EQ(base64({'f', 'o', 'o', 'b', 'a', 'r'}), "Zm9vYmFy");
  EXPECT_EQ(base64({'f', 'o', 'o', 'b'}), "Zm9vYg==");
  EXPECT_EQ(base64({0xff, 0xfe}), "//4=");
  EXPECT_EQ(base64({}), "");
  const VariantSummary summary = summary_of({one_case(0, 30, 0.9, 1, 2, true)}, 0);
  const std::string page = evaluation_page("a & b", {"<note>"}, {{"plan", summary, {{"\"worst\"", {1, 2, 3}}}}});
  EXPECT_NE(page.find("data:image/webp;base64,AQID\""), std::string::npos);
  EXPECT_NE(page.find("&lt;note&gt;"), std::string::npos);
  EXPECT_NE(page.find("alt=\"&quot;worst&quot;\""), std::string::npos);
  EXPECT_TRUE(page.ends_with("</html>\n"));
}

}  // namespace
}  // namespace sparvar
