// The search on made-up models whose answer is known.
#include "pipeline/tune.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kLayers = 8, kScales = 13;

/// What a method computes at the sparse scales, of dense; what it loses is a function of that and its kind.
double share_of(const AttentionMethod& method) {
  if (const auto* probe = std::get_if<ProbeAttention>(&method))
    return probe->share + 1.0 / (probe->stride * probe->stride) + 0.001 * probe->window * probe->window_scales;
  if (const auto* cs4a = std::get_if<Cs4aAttention>(&method)) return cs4a->share + 0.15;
  if (const auto* csla = std::get_if<CslaAttention>(&method)) return 0.05 + 0.004 * csla->windows.back();
  return 1;
}

double loss_of(const AttentionMethod& method) {
  if (std::holds_alternative<DenseAttention>(method)) return 0;
  const double share = share_of(method);
  const double kind = std::holds_alternative<CslaAttention>(method) ? 3 : 1;
  return kind * 0.25 / std::sqrt(share);
}

/// Some layers hardly matter, some a lot; a second of the clock a picture.
struct World {
  double clock = 0;
  int trials = 0;
  std::set<int> seen;
  Trial measure(const AttentionPlan& plan, int index) {
    plan.validate();
    clock += 1;
    ++trials;
    seen.insert(index);
    Trial trial{50.0 + 0.3 * std::sin(index), 0, 0};
    for (int layer = 0; layer < kLayers; ++layer) {
      const AttentionMethod& method = plan.method(layer, kScales - 1);
      trial.psnr -= (layer < 2 ? 6.0 : 0.7) * loss_of(method);
      trial.pairs += share_of(method);
      trial.seconds += share_of(method) * (std::holds_alternative<CslaAttention>(method) ? 0.5 : 1.0);
    }
    return trial;
  }
  TuneProblem problem(double target, double budget) {
    TuneProblem p;
    p.layers = kLayers;
    p.scales = kScales;
    p.target = target;
    p.tuning_cases = 6;
    p.held_out_cases = 10;
    p.budget = budget;
    p.measure = [this](const AttentionPlan& plan, int index) { return measure(plan, index); };
    p.elapsed = [this] { return clock; };
    return p;
  }
};

bool uniform(const Tried& tried) {
  return std::all_of(tried.layers.begin(), tried.layers.end(), [&](int o) { return o == tried.layers.front(); });
}

TEST(Tune, HoldsTheTargetMoreCheaplyThanAnyPlanForAllLayers) {
  World world;
  const TuneResult result = tune(world.problem(38, 1000));
  ASSERT_GE(result.chosen, 0);
  const Tried& chosen = result.tried[result.chosen];
  EXPECT_GE(chosen.held_out_psnr(), 38);
  EXPECT_EQ(static_cast<int>(chosen.held_out.size()), result.held_out_cases);
  EXPECT_TRUE(chosen.on_frontier);
  EXPECT_LT(chosen.cost, 0.5 * result.dense_cost);
  EXPECT_FALSE(uniform(chosen)) << "layers that matter little can do with less";
  // Costs are what the world charges: seconds of each layer's method.
  double cost = 0;
  for (const int option : chosen.layers) {
    const AttentionMethod& method = result.options[option].method;
    cost += share_of(method) * (std::holds_alternative<CslaAttention>(method) ? 0.5 : 1.0);
  }
  EXPECT_NEAR(chosen.cost, cost, 1e-9);
  for (const Tried& tried : result.tried)
    if (uniform(tried) && !tried.tuning.empty() && tried.psnr(1) >= 38) {
      EXPECT_LT(chosen.cost, tried.cost) << tried.name;
    }
  EXPECT_LE(world.clock, 1001);
  EXPECT_TRUE(std::is_sorted(result.tried.begin(), result.tried.end(),
                             [](const Tried& a, const Tried& b) { return a.cost < b.cost; }));
}

TEST(Tune, JudgesByCasesThatTheSearchHasNotSeen) {
  World world;
  TuneProblem problem = world.problem(38, 1000);
  // What holds on the tuning cases does not on the others: there all sparse plans lose 20 dB more.
  problem.measure = [&](const AttentionPlan& plan, int index) {
    Trial trial = world.measure(plan, index);
    if (index >= problem.tuning_cases && !plan.rules.empty()) trial.psnr -= 20;
    return trial;
  };
  const TuneResult result = tune(problem);
  ASSERT_GE(result.chosen, 0);
  EXPECT_TRUE(result.plan(result.tried[result.chosen], "x").rules.empty()) << "dense is what is left";
}

TEST(Tune, MoreQualityCostsMoreAndDenseIsTheEnd) {
  double before = 0;
  for (const double target : {33.0, 38.0, 43.0, 46.0}) {
    World world;
    const TuneResult result = tune(world.problem(target, 2000));
    const Tried& chosen = result.tried[result.chosen];
    EXPECT_GE(chosen.held_out_psnr(), target);
    EXPECT_GT(chosen.cost, before) << target;
    before = chosen.cost;
  }
  World world;
  TuneProblem problem = world.problem(60, 500);
  problem.measure = [&](const AttentionPlan& plan, int index) {
    Trial trial = world.measure(plan, index);
    if (plan.rules.empty()) trial.psnr = 100;
    return trial;
  };
  const TuneResult all = tune(problem);
  EXPECT_EQ(all.plan(all.tried[all.chosen], "x").rules.size(), 0U);
  EXPECT_NEAR(all.tried[all.chosen].cost, all.dense_cost, 1e-12);
}

TEST(Tune, StaysInItsBudget) {
  for (const double budget : {1.0, 10.0, 60.0, 200.0}) {
    World world;
    const TuneResult result = tune(world.problem(38, budget));
    ASSERT_GE(result.chosen, 0);
    // Dense is judged whatever the time is.
    EXPECT_LE(world.clock, budget + 11) << budget;
    EXPECT_GE(result.tried[result.chosen].held_out_psnr(), 38);
  }
}

TEST(Tune, IsAFunctionOfItsSeed) {
  const auto chosen = [](std::uint64_t seed) {
    World world;
    TuneProblem problem = world.problem(38, 300);
    problem.seed = seed;
    const TuneResult result = tune(problem);
    return result.plan(result.tried[result.chosen], "x");
  };
  EXPECT_EQ(chosen(1), chosen(1));
  EXPECT_FALSE(chosen(1) == chosen(2));
}

TEST(Tune, WithoutTimesPairsAreTheCost) {
  World world;
  TuneProblem problem = world.problem(38, 500);
  problem.measure = [&](const AttentionPlan& plan, int index) {
    Trial trial = world.measure(plan, index);
    trial.seconds = 0;
    return trial;
  };
  const TuneResult result = tune(problem);
  double pairs = 0;
  for (const int option : result.tried[result.chosen].layers) pairs += share_of(result.options[option].method);
  EXPECT_NEAR(result.tried[result.chosen].cost, pairs, 1e-9);
}

TEST(Tune, NeedsCasesToJudgeBy) {
  World world;
  TuneProblem problem = world.problem(38, 100);
  problem.held_out_cases = 0;
  EXPECT_THROW(tune(problem), Error);
}

TEST(OptionPool, HoldsDifferentValidOptionsOnEveryModel) {
  for (const int scales : {2, 5, 7, 10, 13}) {
    std::mt19937_64 random(3);
    const std::vector<LayerOption> options = option_pool(4, scales, 40, random);
    EXPECT_EQ(options.size(), 40U);
    for (std::size_t i = 0; i < options.size(); ++i) {
      const AttentionPlan plan = plan_of("x", options, Assignment(4, static_cast<int>(i)));
      ASSERT_EQ(plan.rules.size(), 1U);
      EXPECT_NO_THROW(plan.validate());
      EXPECT_GE(options[i].first_scale, 1);
      EXPECT_GE(options[i].first_scale, first_tuned_scale(scales));
      EXPECT_LT(options[i].first_scale, scales);
      for (std::size_t j = 0; j < i; ++j) EXPECT_FALSE(options[i] == options[j]);
    }
  }
}

TEST(PlanOf, JoinsLayersThatAreAlike) {
  const std::vector<LayerOption> options = {
      {"dense", DenseAttention{}, 0}, {"a", ProbeAttention{}, 9}, {"b", CslaAttention{}, 10}};
  const AttentionPlan plan = plan_of("p", options, {1, 1, 0, 2, 1, 1});
  ASSERT_EQ(plan.rules.size(), 3U);
  EXPECT_EQ(plan.rules[0], (AttentionRule{0, 1, 9, -1, ProbeAttention{}}));
  EXPECT_EQ(plan.rules[1], (AttentionRule{3, 3, 10, -1, CslaAttention{}}));
  EXPECT_EQ(plan.rules[2], (AttentionRule{4, -1, 9, -1, ProbeAttention{}}));
  EXPECT_EQ(split_at(4, 1, 7, 8), (Assignment{7, 7, 8, 8}));
}

}  // namespace
}  // namespace sparvar
