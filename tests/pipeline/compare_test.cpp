// The sheet of a comparison, and comparisons by the bundled model on its first scales' rules.
#include "pipeline/compare.h"

#include <gtest/gtest.h>

#include <cmath>

#include "image/canvas.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

Drawn drawn(const std::string& name, const Image& image, double psnr) {
  return {AttentionPlan{name, {}}, image, {}, psnr, 0.5};
}

TEST(ComparisonSheet, HasARowOfThreePicturesForEveryPlan) {
  const Image dense = blank(64, 32, {200, 0, 0});
  const Image other = blank(64, 32, {203, 0, 0});
  const Comparison comparison{drawn("dense", dense, INFINITY), {drawn("a", other, 30), drawn("b", dense, INFINITY)}, 0};
  const Image sheet = comparison_sheet(comparison, "title", 5);
  ASSERT_EQ(sheet.width, 3 * 64 + 4 * 8);
  // Where each picture's colour is: two reds, the amplified difference, and even gray where nothing differs.
  const auto rows_of = [&](int x, Colour colour) {
    int rows = 0;
    for (int y = 0; y < sheet.height; ++y) rows += pixel(sheet, x, y) == colour ? 1 : 0;
    return rows;
  };
  EXPECT_EQ(rows_of(8 + 63, {200, 0, 0}), 64);        // dense, twice
  EXPECT_EQ(rows_of(16 + 64 + 63, {203, 0, 0}), 32);  // a
  EXPECT_EQ(rows_of(16 + 64 + 63, {200, 0, 0}), 32);  // b
  EXPECT_EQ(rows_of(24 + 128 + 63, {143, 128, 128}), 32);
  EXPECT_EQ(rows_of(24 + 128 + 63, {128, 128, 128}), 32);
}

TEST(ComparisonSheet, SaysMoreInMoreLines) {
  const Image picture = blank(64, 32, {0, 0, 0});
  const Comparison comparison{drawn("dense", picture, INFINITY), {drawn("a", picture, INFINITY)}, 0};
  EXPECT_EQ(comparison_sheet(comparison, std::string(100, 'x'), 4).height,
            comparison_sheet(comparison, "x", 4).height + 2 * kCellHeight);  // 34 characters a line
}

TEST(SparseShare, CountsPairsOfSparseScalesOnly) {
  GenerateResult result;
  EXPECT_EQ(sparse_share(result), 1);
  result.scales = {{.grid = {1, 1}, .share_of_pairs = 1},
                   {.grid = {2, 2}, .share_of_pairs = 0.5},
                   {.grid = {3, 3}, .share_of_pairs = 0.1}};
  const double first = 4 * 5, second = 9 * 14;
  EXPECT_DOUBLE_EQ(sparse_share(result), (0.5 * first + 0.1 * second) / (first + second));
}

TEST(Compare, NeedsAPlanAndOnePrompt) {
  Pipeline pipeline = Pipeline::load({.model_dir = SPARVAR_MODELS "/emoji", .device = "cpu"});
  CompareOptions options;
  options.generate.prompts = {"a"};
  EXPECT_THROW(compare(pipeline, options), Error);
  options.plans = {AttentionPlan{}};
  options.generate.prompts = {"a", "b"};
  EXPECT_THROW(compare(pipeline, options), Error);
}

}  // namespace
}  // namespace sparvar
