// Dense attention of the device under test against plain double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "support.h"

namespace sparvar {
namespace {

struct Case {
  DType type;
  int batch, heads, queries, keys, dim;
};

void check_against_reference(const Case& c, const AttentionArgs& args, int capacity, bool statistics) {
  const Tensor q = args.q.to(DType::f32), k = args.k.to(DType::f32), v = args.v.to(DType::f32),
               out = args.out.to(DType::f32);
  double worst = 0, worst_log_sum = 0;
  for (int bh = 0; bh<c.batch * c.heads; bh += c.batch * c.heads> 32 ? 5 : 1)
    for (int row = 0; row < c.queries; row += std::max(1, c.queries / 40)) {
      std::vector<double> logits(c.keys, 0.0);
      for (int key = 0; key < c.keys; ++key)
        for (int d = 0; d < c.dim; ++d)
          logits[key] += static_cast<double>(q.data<float>()[(bh * c.queries + row) * c.dim + d]) *
                         k.data<float>()[(static_cast<std::int64_t>(bh) * capacity + key) * c.dim + d] * args.scale;
      const double largest = c.keys == 0 ? 0 : *std::max_element(logits.begin(), logits.end());
      double total = 0;
      for (const double x : logits) total += std::exp(x - largest);
      const std::int64_t at = (static_cast<std::int64_t>(bh / c.heads) * c.queries + row) * c.heads + bh % c.heads;
      for (int d = 0; d < c.dim; ++d) {
        double want = 0;
        for (int key = 0; key < c.keys; ++key)
          want += std::exp(logits[key] - largest) / total *
                  v.data<float>()[(static_cast<std::int64_t>(bh) * capacity + key) * c.dim + d];
        const double difference = std::abs(out.data<float>()[at * c.dim + d] - want);
        if (!(difference <= worst)) worst = difference;
      }
      if (!statistics || c.keys == 0) continue;
      const float* found = args.statistics.data<float>() + (bh * c.queries + row) * 2;
      worst_log_sum = std::max(worst_log_sum, std::abs(found[0] + std::log(found[1]) - largest - std::log(total)));
    }
  const bool bf16 = c.type == DType::bf16;
  EXPECT_LT(worst, bf16 ? 3e-2 : 5e-5);
  EXPECT_LT(worst_log_sum, bf16 ? 3e-3 : 1e-4);
}

TEST(DenseAttention, MatchesDoublePrecision) {
  std::vector<Case> cases;
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const int dim : {16, 20, 40, 64, 80, 96, 112, 128}) cases.push_back({type, 1, 2, 37, 201, dim});
    cases.push_back({type, 2, 3, 130, 515, 64});
    cases.push_back({type, 1, 1, 1, 1, 32});
    cases.push_back({type, 2, 2, 16, 30, 128});
    cases.push_back({type, 1, 2, 65, 63, 33});
    cases.push_back({type, 1, 2, 9, 0, 48});
    cases.push_back({type, 1, 70, 300, 129, 96});    // enough tiles for the large kernel of a GPU
    cases.push_back({type, 2, 4, 2048, 2100, 128});  // enough work for a library's
  }
  for (const int dim : {64, 80, 96, 112, 128}) {  // on Hopper: lists of all keys, in tiles of 64, 192 and 128 queries
    cases.push_back({DType::bf16, 2, 28, 250, 310, dim});
    cases.push_back({DType::bf16, 2, 16, 570, 300, dim});
  }
  for (const int dim : {80, 128}) cases.push_back({DType::bf16, 2, 33, 250, 700, dim});
  cases.push_back({DType::bf16, 2, 28, 570, 129, 128});
  unsigned seed = std::random_device{}();
  for (const Case& c : cases)
    for (const bool statistics : {false, true}) {
      SCOPED_TRACE(::testing::Message() << name_of(c.type) << " b" << c.batch << " h" << c.heads << " q" << c.queries
                                        << " k" << c.keys << " d" << c.dim << " seed " << seed);
      const auto backend = testing::make_backend(c.type);
      const int capacity = c.keys + 3;
      AttentionArgs args{
          .q = testing::random_tensor({c.batch, c.heads, c.queries, c.dim}, seed, 1.5F).to(c.type),
          .k = testing::random_tensor({c.batch, c.heads, capacity, c.dim}, seed + 1, 1.5F).to(c.type),
          .v = testing::random_tensor({c.batch, c.heads, capacity, c.dim}, seed + 2).to(c.type),
          .out = testing::random_tensor({c.batch, c.queries, c.heads, c.dim}, seed + 3, 1e3F).to(c.type),
          .scale = 0.4F / std::sqrt(static_cast<float>(c.dim) / 64.0F),
          .statistics = statistics ? Tensor::zeros(DType::f32, {c.batch, c.heads, c.queries, 2}) : Tensor()};
      backend->dense_attention(args, c.keys);
      check_against_reference(c, args, capacity, statistics);
      seed += 10;
    }
}

}  // namespace
}  // namespace sparvar
