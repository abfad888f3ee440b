// Which tokens run at a pruned scale, and how the map is put together again.
#include "models/token_pruning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "models/attention_runner.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_tensor;

TEST(TokenPruning, KeepsTheRowsFarthestFromTheMean) {
  const Tensor x = random_tensor({2, 23, 7}, 3);
  std::vector<double> mean(7);
  for (int i = 0; i < 23; ++i)
    for (int c = 0; c < 7; ++c) mean[c] += static_cast<double>(x.data<float>()[i * 7 + c]) / 23;
  std::vector<std::pair<double, int>> order;
  for (int i = 0; i < 23; ++i) {
    double distance = 0;
    for (int c = 0; c < 7; ++c) distance += std::pow(x.data<float>()[i * 7 + c] - mean[c], 2);
    order.emplace_back(-distance, i);
  }
  std::sort(order.begin(), order.end());
  for (const int count : {1, 9, 23}) {
    std::vector<std::int32_t> want;
    for (int i = 0; i < count; ++i) want.push_back(order[i].second);
    std::sort(want.begin(), want.end());
    EXPECT_EQ(farthest_rows(x, count), want);
  }
  EXPECT_EQ(farthest_rows(Tensor::zeros(DType::f32, {1, 4, 2}), 2), (std::vector<std::int32_t>{0, 1}));
}

TEST(TokenPruning, RowsComeBackWhereTheyWere) {
  const Tensor x = random_tensor({2, 6, 3}, 4);
  const std::vector<std::int32_t> rows = {1, 2, 5};
  const Tensor taken = rows_taken(x, rows);
  ASSERT_EQ(taken.shape(), (Shape{2, 3, 3}));
  EXPECT_EQ(taken.data<float>()[(1 * 3 + 2) * 3 + 1], x.data<float>()[(1 * 6 + 5) * 3 + 1]);
  Tensor back = Tensor::zeros(DType::f32, {2, 6, 3});
  put_rows(back, rows, taken);
  for (int b = 0; b < 2; ++b)
    for (int i = 0; i < 6; ++i)
      for (int c = 0; c < 3; ++c) {
        const int at = (b * 6 + i) * 3 + c;
        EXPECT_EQ(back.data<float>()[at], i == 1 || i == 2 || i == 5 ? x.data<float>()[at] : 0.0F);
      }
  EXPECT_THROW(put_rows(back, {1}, taken), Error);
  EXPECT_THROW(farthest_rows(Tensor::zeros(DType::bf16, {1, 4, 2}), 2), Error);
}

TEST(TokenPruning, OnlyKeysOfTokensThatRanAreRead) {
  const ScaleSchedule schedule = {{2, 2}, {3, 4}, {5, 4}};
  AttentionPlan plan;
  plan.pruning = {.first_scale = 1, .keep = {0.5, 0.25}};  // 4, 6 and 5 tokens
  const auto backend = make_cpu_backend({.compute = DType::f32, .threads = 1});
  AttentionRunner runner(*backend, plan, schedule, 1);
  const Tensor q = random_tensor({1, 2, 5, 8}, 1), k = random_tensor({1, 2, 20, 8}, 2),
               v = random_tensor({1, 2, 20, 8}, 3);
  AttentionArgs args{
      .q = q, .k = k, .v = v, .out = Tensor::zeros(DType::f32, {1, 5, 2, 8}), .scale = 1, .statistics = {}};
  runner.start(2);
  runner.run(0, 2, args);
  EXPECT_DOUBLE_EQ(runner.share_of_pairs(2), 5.0 * 15 / (20 * 36));
  for (int head = 0; head < 2; ++head)
    for (int i = 0; i < 5; ++i) {
      std::vector<double> weights(15);
      double total = 0;
      for (int key = 0; key < 15; ++key) {
        double dot = 0;
        for (int c = 0; c < 8; ++c)
          dot +=
              static_cast<double>(q.data<float>()[(head * 5 + i) * 8 + c]) * k.data<float>()[(head * 20 + key) * 8 + c];
        total += weights[key] = std::exp(dot);
      }
      for (int c = 0; c < 8; ++c) {
        double want = 0;
        for (int key = 0; key < 15; ++key) want += weights[key] / total * v.data<float>()[(head * 20 + key) * 8 + c];
        EXPECT_NEAR(args.out.data<float>()[(i * 2 + head) * 8 + c], want, 1e-5);
      }
    }
}

}  // namespace
}  // namespace sparvar
