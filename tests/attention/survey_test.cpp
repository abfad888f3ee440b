// Masks of plans, and the figures counted on them.
#include "attention/survey.h"

#include <gtest/gtest.h>

#include "attention/csla.h"

namespace sparvar {
namespace {

ScaleSchedule square_1m() {
  ScaleSchedule schedule;
  for (const int side : {1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64}) schedule.push_back({side, side});
  return schedule;
}

const AttentionMethod& method_at(const AttentionPlan& plan, int scale) { return plan.method(0, scale); }

/// Pairs of a mask as a matrix of bytes; list 0.
std::vector<std::uint8_t> matrix(const Mask& mask, int queries, int keys) {
  std::vector<std::uint8_t> out(static_cast<std::size_t>(queries) * keys, 0);
  for (int t = 0; t < mask.tiles.count(); ++t)
    for (int i = mask.tiles.offset[t]; i < mask.tiles.offset[t + 1]; ++i)
      for (std::int64_t r = mask.lists.offset[t]; r < mask.lists.offset[t + 1]; ++r)
        for (int key = 0; key < mask.lists.runs[r].count; ++key)
          out[static_cast<std::size_t>(mask.tiles.rows[i]) * keys + mask.lists.runs[r].begin + key] = 1;
  return out;
}

// The authors' figure: 435 of 2656 blocks of 128x128 at the square last scale, whatever tiles the lists are made for.
TEST(Survey, CslaComputesThePublishedNumberOfBlocks) {
  const ScaleSchedule schedule = square_1m();
  for (const char* name : {"csla", "csla-blocks"}) {
    const AttentionPlan plan = AttentionPlan::preset(name, 8, 13);
    const Survey s = survey(static_mask(method_at(plan, 12), schedule, 12), schedule, 12, 128);
    EXPECT_EQ(s.blocks.rows * s.blocks.columns, 2656) << name;
    EXPECT_EQ(s.blocks.count(), 435) << name;
    EXPECT_NEAR(100 * s.blocks.sparsity(), 83.62, 0.005) << name;
  }
}

TEST(Survey, ListsOfTilesHoldTheKeysOfTheirQueries) {
  const ScaleSchedule schedule = {{1, 1}, {3, 2}, {7, 5}, {11, 9}};
  CslaAttention csla;
  csla.windows = {-1, -1, 3, 5};
  csla.sink_scales = 1;
  csla.group = {4, 3, 0};
  const int queries = 99, keys = 1 + 6 + 35 + 99;
  const StaticMask mask = static_mask(csla, schedule, 3);
  const auto tokens = matrix(mask.tokens, queries, keys);
  const auto lists = matrix(mask.lists, queries, keys);
  // The definition, pair by pair.
  std::int64_t seen = 0, least = keys, most = 0;
  for (int q = 0; q < queries; ++q) {
    std::int64_t mine = 0;
    for (int key = 0; key < keys; ++key) {
      int scale = 0, at = key;
      while (at >= schedule[scale].tokens()) at -= schedule[scale++].tokens();
      const Grid grid = schedule[scale];
      const int window = csla.windows[scale];
      const auto rows = window_bounds(q / 9, 11, grid.h, window, csla.centre);
      const auto columns = window_bounds(q % 9, 9, grid.w, window, csla.centre);
      const int v = at / grid.w, u = at % grid.w;
      const bool visible = scale == 0 || (v >= rows.begin && v < rows.end && u >= columns.begin && u < columns.end);
      ASSERT_EQ(tokens[static_cast<std::size_t>(q) * keys + key], visible) << q << ", " << key;
      ASSERT_GE(lists[static_cast<std::size_t>(q) * keys + key], visible ? 1 : 0);
      mine += visible ? 1 : 0;
    }
    seen += mine;
    least = std::min(least, mine);
    most = std::max(most, mine);
  }
  const Survey s = survey(mask, schedule, 3, 16);
  EXPECT_EQ(s.tokens.least, least);
  EXPECT_EQ(s.tokens.most, most);
  EXPECT_DOUBLE_EQ(s.tokens.mean, static_cast<double>(seen) / queries);
  EXPECT_DOUBLE_EQ(s.token_sparsity, 1 - static_cast<double>(seen) / (queries * keys));
  EXPECT_DOUBLE_EQ(s.list_sparsity,
                   1 - static_cast<double>(std::count(lists.begin(), lists.end(), 1)) / (queries * keys));
  EXPECT_GT(s.token_sparsity, s.list_sparsity);

  std::vector<std::uint8_t> blocks(static_cast<std::size_t>(7) * 9, 0);  // ceil(99 / 16), ceil(141 / 16)
  for (int q = 0; q < queries; ++q)
    for (int key = 0; key < keys; ++key)
      blocks[q / 16 * 9 + key / 16] |= tokens[static_cast<std::size_t>(q) * keys + key];
  EXPECT_EQ(s.blocks.computed, blocks);
  const auto whole = matrix(whole_blocks(s.blocks, queries, keys), queries, keys);
  for (int q = 0; q < queries; ++q)
    for (int key = 0; key < keys; ++key)
      ASSERT_EQ(whole[static_cast<std::size_t>(q) * keys + key], blocks[q / 16 * 9 + key / 16]);
}

TEST(Survey, DenseReadsEverything) {
  const ScaleSchedule schedule = {{1, 1}, {3, 2}};
  const Survey s = survey(static_mask(DenseAttention{}, schedule, 1), schedule, 1, 128);
  EXPECT_EQ(s.tokens.least, 7);
  EXPECT_EQ(s.lists.most, 7);
  EXPECT_EQ(s.token_sparsity, 0);
  EXPECT_EQ(s.blocks.sparsity(), 0);
  EXPECT_EQ(dynamic_part(DenseAttention{}, schedule, 1), "");
}

TEST(Survey, SaysWhatDependsOnThePicture) {
  const ScaleSchedule schedule = square_1m();
  const AttentionPlan probe = AttentionPlan::preset("probe", 8, 13);
  // 3 % of 10521 keys; 64 probes in a grid of 8x8.
  EXPECT_EQ(chosen_keys(method_at(probe, 12), schedule, 12), 316);
  EXPECT_NE(dynamic_part(method_at(probe, 12), schedule, 12).find("64 probes"), std::string::npos);
  const AttentionPlan cs4a = AttentionPlan::preset("cs4a", 8, 13);
  EXPECT_EQ(chosen_keys(method_at(cs4a, 10), schedule, 10), 0);
  EXPECT_EQ(chosen_keys(method_at(cs4a, 12), schedule, 12), 824);  // 20 % of 4121
  EXPECT_NE(dynamic_part(method_at(cs4a, 10), schedule, 10).find("decides"), std::string::npos);
  EXPECT_NE(dynamic_part(method_at(cs4a, 12), schedule, 12).find("824 keys"), std::string::npos);
  EXPECT_EQ(dynamic_part(method_at(AttentionPlan::preset("csla", 8, 13), 12), schedule, 12), "");
}

// What is static of CS4A is its window: 7x7 around each query of an 8x8 tile is 14x14 inside the map, 11x11 in a
// corner.
TEST(Survey, StaticPartOfDynamicPlansIsTheirWindows) {
  const ScaleSchedule schedule = square_1m();
  const StaticMask cs4a = static_mask(method_at(AttentionPlan::preset("cs4a", 8, 13), 12), schedule, 12);
  EXPECT_EQ(keys_per_query(cs4a.lists).most, 14 * 14);
  EXPECT_EQ(keys_per_query(cs4a.lists).least, 11 * 11);
  const StaticMask decision = static_mask(method_at(AttentionPlan::preset("cs4a", 8, 13), 10), schedule, 10);
  EXPECT_EQ(keys_per_query(decision.lists).least, 4121);
  const StaticMask probe = static_mask(method_at(AttentionPlan::preset("sparvar", 8, 13), 12), schedule, 12);
  EXPECT_GE(keys_per_query(probe.lists).least, 121 + 12 * 12);  // sinks and the own scale's window
}

}  // namespace
}  // namespace sparvar
