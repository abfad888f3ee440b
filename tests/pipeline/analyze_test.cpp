// What the analyzer counts, against the definitions in double precision on whole maps.
#include "pipeline/analyze.h"

#include <gtest/gtest.h>

#include <cmath>

#include "image/canvas.h"
#include "pipeline/heat_map.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_tensor;

const ScaleSchedule kSchedule = {{1, 1}, {2, 3}, {4, 5}, {7, 9}};
constexpr int kHeads = 3, kDim = 8, kBatch = 2;
constexpr float kScale = 0.9F;

CslaAttention windows() {
  CslaAttention csla;
  csla.windows = {-1, -1, 1, 3};
  csla.sink_scales = 2;
  csla.centre = CslaAttention::Centre::half_pixel;
  return csla;
}

int keys_of(int k) {
  int keys = 0;
  for (int j = 0; j <= k; ++j) keys += kSchedule[j].tokens();
  return keys;
}

/// Queries of every scale, and keys of all.
struct Scene {
  Tensor k = random_tensor({kBatch, kHeads, keys_of(3), kDim}, 7, 1.2F);
  std::vector<Tensor> q;
  Scene() {
    for (int scale = 0; scale < 4; ++scale)
      q.push_back(random_tensor({kBatch, kHeads, kSchedule[scale].tokens(), kDim}, 20 + scale, 1.2F));
  }
  AttentionArgs at(int scale) const {
    return {.q = q[scale], .k = k, .v = {}, .out = {}, .scale = kScale, .statistics = {}};
  }
  /// Of the first batch entry.
  std::vector<double> row(int scale, int head, int token) const {
    std::vector<double> w(keys_of(scale));
    double total = 0;
    for (std::size_t key = 0; key < w.size(); ++key) {
      double dot = 0;
      for (int d = 0; d < kDim; ++d)
        dot += static_cast<double>(q[scale].data<float>()[(head * kSchedule[scale].tokens() + token) * kDim + d]) *
               k.data<float>()[(head * keys_of(3) + static_cast<int>(key)) * kDim + d];
      total += w[key] = std::exp(kScale * dot);
    }
    for (double& weight : w) weight /= total;
    return w;
  }
};

/// Linear interpolation between the two nearest centres, the edge repeated.
double resized(const double* map, Grid from, Grid to, int v, int u) {
  const auto clamp = [](double x, int size) { return std::min(std::max(x, 0.0), size - 1.0); };
  const double y = clamp((v + 0.5) * from.h / to.h - 0.5, from.h), x = clamp((u + 0.5) * from.w / to.w - 0.5, from.w);
  double sum = 0;
  for (int i = 0; i < from.h; ++i)
    for (int j = 0; j < from.w; ++j)
      sum += std::max(0.0, 1 - std::abs(i - y)) * std::max(0.0, 1 - std::abs(j - x)) * map[i * from.w + j];
  return sum;
}

double pearson(const std::vector<double>& a, const std::vector<double>& b) {
  double ma = 0, mb = 0, va = 0, vb = 0, cov = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ma += a[i] / static_cast<double>(a.size());
    mb += b[i] / static_cast<double>(a.size());
  }
  for (std::size_t i = 0; i < a.size(); ++i) {
    va += (a[i] - ma) * (a[i] - ma);
    vb += (b[i] - mb) * (b[i] - mb);
    cov += (a[i] - ma) * (b[i] - mb);
  }
  return cov / std::sqrt(va * vb);
}

TEST(Analyzer, AgreesWithDefinitionsOnWholeMaps) {
  const Scene scene;
  AttentionAnalyzer analyzer({kSchedule, {2, 3}, 100, windows()});  // every query
  int samples = 0;
  analyzer.on_sample = [&](const SampledAttention& sample) {
    ++samples;
    ASSERT_EQ(static_cast<int>(sample.tokens.size()), kSchedule[sample.scale].tokens());
    for (int head = 0; head < kHeads; ++head)
      for (std::size_t i = 0; i < sample.tokens.size(); ++i) {
        const std::vector<double> want = scene.row(sample.scale, head, sample.tokens[i]);
        for (std::size_t key = 0; key < want.size(); ++key)
          ASSERT_NEAR(sample.row(head, static_cast<int>(i))[key], want[key], 1e-6);
      }
  };
  for (int scale = 0; scale < 4; ++scale)
    for (int layer = 0; layer < 2; ++layer) analyzer.observe(layer, scale, scene.at(scale));
  EXPECT_EQ(samples, 4);
  ASSERT_EQ(analyzer.sums().size(), 4U);

  for (const int k : {2, 3})
    for (int head = 0; head < kHeads; ++head) {
      const Grid grid = kSchedule[k];
      std::vector<double> mass(k + 1), distance(k + 1), bins(kDistanceBins);
      std::vector<std::vector<double>> a(k + 1), b(k + 1);
      double in_windows = 0;
      for (int token = 0; token < grid.tokens(); ++token) {
        const int y = token / grid.w, x = token % grid.w;
        const Grid below = kSchedule[k - 1];
        const int parent =
            static_cast<int>((y + 0.5) * below.h / grid.h) * below.w + static_cast<int>((x + 0.5) * below.w / grid.w);
        const std::vector<double> row = scene.row(k, head, token), before = scene.row(k - 1, head, parent);
        int key = 0;
        for (int j = 0; j <= k; ++j)
          for (int v = 0; v < kSchedule[j].h; ++v)
            for (int u = 0; u < kSchedule[j].w; ++u, ++key) {
              mass[j] += row[key];
              const double cy = (y + 0.5) * kSchedule[j].h / grid.h, cx = (x + 0.5) * kSchedule[j].w / grid.w;
              const double far = std::max(std::abs(v + 0.5 - cy), std::abs(u + 0.5 - cx));
              distance[j] += row[key] * far;
              if (j == k) bins[std::min<long>(std::lround(far), kDistanceBins - 1)] += row[key];
              if (j >= 2 && std::abs(v - std::floor(cy)) <= (j == 2 ? 0 : 1) &&
                  std::abs(u - std::floor(cx)) <= (j == 2 ? 0 : 1))
                in_windows += row[key];
              if (j == 0) continue;
              a[j].push_back(row[key]);
              int first = 0;
              for (int i = 0; i + 1 < j; ++i) first += kSchedule[i].tokens();
              b[j].push_back(resized(before.data() + first, kSchedule[j - 1], kSchedule[j], v, u));
            }
      }
      const HeadSums& sums = analyzer.sums().at({1, k})[head];
      const double n = grid.tokens();
      EXPECT_EQ(sums.queries, n);
      EXPECT_NEAR(sums.window_share(), in_windows / n, 1e-5) << k;
      EXPECT_NEAR(sums.sinks(2), (mass[0] + mass[1]) / n, 1e-5);
      double similarity = 0;
      for (int j = 0; j <= k; ++j) {
        EXPECT_NEAR(sums.mass_share(j), mass[j] / n, 1e-5);
        EXPECT_NEAR(sums.mean_distance(j), distance[j] / mass[j], 1e-4);
        if (j == 0) continue;
        EXPECT_NEAR(sums.similarity[j].value(), pearson(a[j], b[j]), 1e-4) << k << " " << j;
        similarity += pearson(a[j], b[j]) / k;
      }
      EXPECT_NEAR(sums.mean_similarity(), similarity, 1e-4);
      for (int bin = 0; bin < kDistanceBins; ++bin) EXPECT_NEAR(sums.distances[k].weight[bin], bins[bin], 1e-4);
    }
}

TEST(Analyzer, CountsProbabilitiesThatTheCallerHas) {
  const Scene scene;
  AttentionAnalyzer seen({kSchedule, {2, 3}, 3, windows()}), counted({kSchedule, {2, 3}, 3, windows()});
  for (int scale = 0; scale < 4; ++scale) seen.observe(1, scale, scene.at(scale));
  for (const int k : {2, 3})
    for (int head = 0; head < kHeads; ++head) {
      std::vector<float> rows, before;
      for (const std::int32_t token : sampled_tokens(kSchedule[k], 3)) {
        for (const double weight : scene.row(k, head, token)) rows.push_back(static_cast<float>(weight));
        const std::int32_t parent = token_under(token, kSchedule[k], kSchedule[k - 1]);
        for (const double weight : scene.row(k - 1, head, parent)) before.push_back(static_cast<float>(weight));
      }
      counted.count(1, k, head, kHeads, rows, before);
      const HeadSums& a = seen.sums().at({1, k})[head];
      const HeadSums& b = counted.sums().at({1, k})[head];
      EXPECT_EQ(a.queries, b.queries);
      EXPECT_NEAR(a.window_share(), b.window_share(), 1e-6);
      EXPECT_NEAR(a.mean_similarity(), b.mean_similarity(), 1e-5);
      EXPECT_THROW(counted.count(1, k, head, kHeads, {rows.data(), rows.size() - 1}, {}), Error);
      EXPECT_THROW(counted.count(1, k, kHeads, kHeads, rows, before), Error);
      EXPECT_THROW(counted.count(1, k, head, kHeads + 1, rows, before), Error);
      EXPECT_THROW(counted.count(1, 1, head, kHeads, rows, before), Error) << "not a scale that is looked at";
    }
}

TEST(Analyzer, FindsTheSimilarityThatIsThere) {
  // Queries and keys that depend on the place alone: attention of a scale is that of the one below, resized.
  const ScaleSchedule schedule = {{8, 8}, {16, 16}};
  const auto place = [](int scale_side, int token, float* to) {
    const float y = (static_cast<float>(token / scale_side) + 0.5F) / static_cast<float>(scale_side);
    const float x = (static_cast<float>(token % scale_side) + 0.5F) / static_cast<float>(scale_side);
    to[0] = std::cos(2 * y), to[1] = std::sin(2 * y), to[2] = std::cos(2 * x), to[3] = std::sin(2 * x);
  };
  Tensor k = Tensor::empty(DType::f32, {1, 1, 64 + 256, 4});
  Tensor q0 = Tensor::empty(DType::f32, {1, 1, 64, 4}), q1 = Tensor::empty(DType::f32, {1, 1, 256, 4});
  for (int t = 0; t < 64; ++t) place(8, t, k.data<float>() + 4 * t), place(8, t, q0.data<float>() + 4 * t);
  for (int t = 0; t < 256; ++t) place(16, t, k.data<float>() + 4 * (64 + t)), place(16, t, q1.data<float>() + 4 * t);
  CslaAttention none;
  none.sink_scales = 0;
  AttentionAnalyzer analyzer({schedule, {1}, 16, none});
  analyzer.observe(0, 0, {.q = q0, .k = k, .v = {}, .out = {}, .scale = 8, .statistics = {}});
  analyzer.observe(0, 1, {.q = q1, .k = k, .v = {}, .out = {}, .scale = 8, .statistics = {}});
  EXPECT_GT(analyzer.sums().at({0, 1})[0].similarity[1].value(), 0.95);
}

TEST(Analyzer, LooksAtASampleAndRefusesScalesThatAreNotThere) {
  EXPECT_EQ(sampled_tokens({4, 6}, 2), (std::vector<std::int32_t>{1 * 6 + 1, 1 * 6 + 4, 3 * 6 + 1, 3 * 6 + 4}));
  EXPECT_EQ(sampled_tokens({2, 3}, 16), (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(token_under(63, {8, 8}, {3, 5}), 14);
  EXPECT_THROW(AttentionAnalyzer({kSchedule, {4}, 2, windows()}), Error);
  const Scene scene;
  AttentionAnalyzer analyzer({kSchedule, {3}, 2, windows()});
  for (int scale = 0; scale < 4; ++scale) analyzer.observe(0, scale, scene.at(scale));
  EXPECT_EQ(analyzer.sums().at({0, 3})[0].queries, 4);
  EXPECT_FALSE(std::isnan(analyzer.sums().at({0, 3})[0].mean_similarity()));
}

TEST(Correlation, HasNoValueWhereNothingVaries) {
  Correlation one;
  for (int i = 0; i < 10; ++i) one.add(0.1, i);
  EXPECT_TRUE(std::isnan(one.value()));
  Correlation line;
  for (int i = 0; i < 10; ++i) line.add(i, 3 - 2 * i);
  EXPECT_NEAR(line.value(), -1, 1e-12);
}

TEST(HeatMap, IsDarkWhereTheWeightIs) {
  const ScaleSchedule schedule = {{1, 1}, {2, 2}};
  SampledAttention sample{0, 1, 1, 5, {0, 3}, {0, 1, 0, 0, 0, 0.2F, 0.2F, 0.2F, 0.2F, 0.2F}};
  const Image image = heat_map(sample, schedule, 1);
  const int top = image.height - 2;
  const auto brightness = [&](int x, int y) {
    const Colour c = pixel(image, x, y);
    return c.r + c.g + c.b;
  };
  EXPECT_EQ(image.width, 1 + 1 + 4);
  EXPECT_EQ(brightness(0, top), 3 * 255);
  EXPECT_LT(brightness(2, top), brightness(2, top + 1)) << "all of the weight is darker than a fifth of it";
  EXPECT_EQ(brightness(0, top + 1), brightness(5, top + 1));
  EXPECT_LT(brightness(5, top + 1), 3 * 255);
}

}  // namespace
}  // namespace sparvar
