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
    Trial trial{.psnr = 50.0 + 0.3 * std::sin(index)};
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

TEST(Tune, JudgesTheWholeFrontier) {
  World world;
  const TuneResult result = tune(world.problem(38, 1500));
  ASSERT_GE(result.judged.size(), 4U);
  EXPECT_GE(result.held_out_cases, 5);
  EXPECT_TRUE(std::find(result.judged.begin(), result.judged.end(), result.chosen) != result.judged.end());
  bool below = false, above = false;
  double psnr = 0, cost = 0;
  for (const int index : result.judged) {
    const Tried& plan = result.tried[index];
    EXPECT_EQ(static_cast<int>(plan.held_out.size()), result.held_out_cases);
    EXPECT_LE(plan.held_out_worst(), plan.held_out_psnr());
    EXPECT_GE(plan.cost, cost);
    cost = plan.cost;
    // All cases of this world rank plans alike, so what nothing beat in the search stays unbeaten.
    EXPECT_TRUE(plan.on_frontier) << plan.name;
    EXPECT_GT(plan.held_out_psnr(), psnr) << plan.name;
    psnr = plan.held_out_psnr();
    below = below || psnr < 38;
    above = above || (psnr >= 38 && cost < result.dense_cost);
  }
  EXPECT_TRUE(below && above) << "both sides of the target";
  // Nothing that has all tuning pictures is cheaper and better than one of them.
  for (const Tried& other : result.tried)
    for (const int index : result.judged) {
      const Tried& plan = result.tried[index];
      if (other.tuning.size() < 6 || plan.tuning.size() < 6) continue;
      EXPECT_FALSE(other.cost < plan.cost - 1e-12 && other.psnr(6) > plan.psnr(6) + 1e-12)
          << other.name << " beats " << plan.name;
    }
}

TEST(Tune, ASplitIsSearchedForAndMoved) {
  World world;
  const TuneResult result = tune(world.problem(38, 1500));
  std::set<int> bounds;
  for (const Tried& tried : result.tried)
    if (const std::vector<LayerRun> runs = runs_of(tried.layers); runs.size() == 2) bounds.insert(runs[1].first);
  EXPECT_GE(bounds.size(), 4U);
}

TEST(Tune, CountedTrialsHangOnNoClock) {
  const auto plan = [](double speed, double* clock) {
    World world;
    TuneProblem problem = world.problem(38, 400);
    problem.cost = TuneCost::pairs;
    problem.measure = [&](const AttentionPlan& of, int index) {
      Trial trial = world.measure(of, index);
      trial.seconds *= speed * (1 + world.trials % 7);  // a machine with other work to do
      return trial;
    };
    problem.elapsed = [&] { return static_cast<double>(world.trials); };
    const TuneResult result = tune(problem);
    *clock = world.trials;
    return result.plan(result.tried[result.chosen], "x");
  };
  double first = 0, second = 0;
  EXPECT_EQ(plan(1, &first), plan(30, &second));
  EXPECT_EQ(first, second);
  EXPECT_GE(first, 300);
  EXPECT_LE(first, 400 + 1);
}

TEST(TuneBoard, LearnsThePairsOfAnOptionFromAPlanWhereItAloneIsNew) {
  TuneBoard board(kScales, TuneCost::pairs);
  const auto put = [&](const Assignment& layers, double pairs, double psnr) {
    const int index = board.add(layers);
    board.tried[index].tuning = {{.psnr = psnr, .seconds = 0, .pairs = pairs, .share = 1, .speed_up = 0}};
    return index;
  };
  const int probe = board.add_option({"probe", ProbeAttention{}, 10}),
            csla = board.add_option({"csla", CslaAttention{}, 10});
  EXPECT_EQ(board.add_option({"again", ProbeAttention{}, 10}), probe);
  const int dense = put({0, 0, 0, 0}, 8, 100);
  const int mixed = put({probe, csla, 0, 0}, 5, 35);  // probe is 1, csla 0.5 a layer
  const int half = put({probe, probe, 0, 0}, 6, 40);  // the first that tells of probe
  board.update_costs();
  EXPECT_DOUBLE_EQ(board.cost_of({probe, probe, probe, probe}), 4);
  EXPECT_DOUBLE_EQ(board.cost_of({csla, csla, csla, csla}), 0);
  board.tried[mixed].tuning.front().pairs = 5.5;
  board.update_costs();
  EXPECT_DOUBLE_EQ(board.cost_of({csla, csla, csla, csla}), 2);
  EXPECT_EQ(board.frontier(1), (std::vector<int>{mixed, half, dense}));
  EXPECT_FALSE(board.beaten(mixed));
  const int bad = put({csla, csla, 0, 0}, 5, 34);
  const int worse = put({0, probe, csla, 0}, 5.5, 34);
  board.update_costs();
  EXPECT_FALSE(board.beaten(bad));
  EXPECT_TRUE(board.beaten(worse)) << "as expensive as another, and worse";
  // Two pictures of one, one of the other: the first is what both have.
  board.tried[half].tuning.push_back({.psnr = 10, .seconds = 0, .pairs = 6, .share = 1, .speed_up = 0});
  EXPECT_FALSE(board.beaten(half));
  EXPECT_EQ(board.frontier(2), (std::vector<int>{half}));
}

TEST(TuneBoard, ThinningKeepsTheEndsAndWhatIsFarApart) {
  TuneBoard board(kScales, TuneCost::pairs);
  std::vector<int> frontier;
  for (const double psnr : {20.0, 25.0, 25.2, 25.3, 30.0, 40.0}) {
    const int option = board.add_option({"o", ProbeAttention{.stride = 1 + static_cast<int>(frontier.size())}, 10});
    frontier.push_back(board.add({option}));
    board.tried[frontier.back()].tuning = {{.psnr = psnr, .seconds = 0, .pairs = psnr, .share = 1, .speed_up = 0}};
  }
  EXPECT_EQ(thinned(board, frontier, 6, -1), frontier);
  EXPECT_EQ(thinned(board, frontier, 5, -1), (std::vector<int>{0, 1, 3, 4, 5}));
  EXPECT_EQ(thinned(board, frontier, 4, 2), (std::vector<int>{0, 2, 4, 5}));
  EXPECT_EQ(thinned(board, frontier, 1, -1).size(), 3U);
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

/// What of `b` differs from `a`, as its JSON tells.
std::set<std::string> changed_keys(const LayerOption& a, const LayerOption& b) {
  const auto lines = [](const LayerOption& option) {
    std::multiset<std::string> out;
    std::string line, key;
    for (const char c : plan_of("x", {option}, {0}).to_json()) {
      if (c != '\n') {
        line += c;
        continue;
      }
      if (const std::size_t quote = line.find("\": "); quote != std::string::npos)
        key = line.substr(line.find('"') + 1, quote - line.find('"') - 1);
      out.insert(key + "|" + line);
      line.clear();
    }
    return out;
  };
  std::set<std::string> keys;
  const std::multiset<std::string> of_a = lines(a), of_b = lines(b);
  std::vector<std::string> differ;
  std::set_symmetric_difference(of_a.begin(), of_a.end(), of_b.begin(), of_b.end(), std::back_inserter(differ));
  for (const std::string& line : differ) keys.insert(line.substr(0, line.find('|')));
  return keys;
}

TEST(Neighbours, StepInEveryParameterAndNoOtherThanOne) {
  const std::pair<LayerOption, std::set<std::string>> cases[] = {
      {{"", CslaAttention{}, 10}, {"windows", "sink_scales", "tile_h", "tile_w", "scales"}},
      {{"", Cs4aAttention{}, 10},
       {"decision_scale", "scales", "share", "tile_h", "rows", "tile_w", "carry", "own_windows", "residual"}},
      {{"", ProbeAttention{}, 10},
       {"stride", "share", "tile_h", "tile_w", "window", "window_scales", "sink_scales", "residual", "scales"}},
  };
  for (const auto& [option, expected] : cases) {
    std::set<std::string> seen;
    for (const LayerOption& next : neighbours(option, kScales)) {
      EXPECT_FALSE(next == option);
      EXPECT_NO_THROW(plan_of("x", {next}, {0}).validate()) << next.name;
      EXPECT_EQ(next.name, described(next));
      EXPECT_EQ(next.method.index(), option.method.index());
      const std::set<std::string> changed = changed_keys(option, next);
      EXPECT_FALSE(changed.empty());
      const bool group = changed.contains("tile_h") || changed.contains("tile_w") || changed.contains("rows");
      const bool scale = changed.contains("scales");
      EXPECT_TRUE(changed.size() == 1 || group || scale) << next.name;
      seen.insert(changed.begin(), changed.end());
    }
    for (const std::string& key : expected) EXPECT_TRUE(seen.contains(key)) << described(option) << ": " << key;
  }
  EXPECT_TRUE(neighbours({"dense", DenseAttention{}, 12}, kScales).empty());
  EXPECT_TRUE(neighbours({"", ProbeAttention{.window = 0}, 1}, 2).size() > 5) << "two scales";
}

TEST(Neighbours, StayValidHoweverFarOneWalks) {
  for (const int scales : {2, 9, 13}) {
    std::mt19937_64 random(7);
    for (LayerOption option : option_pool(4, scales, 12, random))
      for (int i = 0; i < 60; ++i) {
        const std::vector<LayerOption> next = neighbours(option, scales);
        ASSERT_FALSE(next.empty());
        option = next[drawn(random, next.size())];
        ASSERT_NO_THROW(plan_of("x", {option}, {0}).validate()) << option.name;
        ASSERT_GE(option.first_scale, first_tuned_scale(scales));
        ASSERT_LT(option.first_scale, scales);
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
  EXPECT_EQ(name_of(options, {1, 1, 0, 2, 1, 1}), "layers 0-1: a; layer 2: dense; layer 3: b; layers 4-5: a");
  EXPECT_EQ(name_of(options, {2, 2}), "b");
  EXPECT_EQ(split_at(4, 1, 7, 8), (Assignment{7, 7, 8, 8}));
}

}  // namespace
}  // namespace sparvar
