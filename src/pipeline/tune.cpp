#include "pipeline/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "pipeline/median.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kDense = 0;               // option 0 of every table
constexpr double kHalvingUntil = 0.45;  // of the budget
constexpr double kRefiningUntil = 0.75;
constexpr int kSmallestPool = 8, kLargestPool = 64;
constexpr int kSurvivors = 4;  // of the halving
constexpr int kMostTuningCases = 8;
constexpr int kEnoughToRefuse = 3;    // held-out cases after which a plan that is this far below is given up
constexpr double kHopeless = 2;       // dB
constexpr double kCloseEnough = 0.5;  // dB below the target on the tuning cases: may still hold on the others

double mean_psnr(const std::vector<Trial>& trials, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += trials[i].psnr;
  return sum / static_cast<double>(count);
}

class Tuner {
 public:
  explicit Tuner(const TuneProblem& problem)
      : problem_(problem), random_(problem.seed), cases_(std::min(problem.tuning_cases, kMostTuningCases)) {}

  TuneResult run();

 private:
  double left(double share) const { return share * problem_.budget - problem_.elapsed(); }
  void tell(const std::string& stage) const {
    if (problem_.on_progress) problem_.on_progress(stage, problem_.elapsed() / problem_.budget);
  }
  int add(const std::string& name, const Assignment& layers);
  /// Until `tried` has trials of `cases` tuning cases; false where time ran out before.
  bool measure(int index, int cases, double until);
  void calibrate();
  double cost_of(const Assignment& layers) const;
  void update_costs();
  std::vector<int> ranked(std::vector<int> candidates, std::size_t cases) const;
  std::vector<int> halve();
  void make_pool();
  int start_of_refinement(const std::vector<int>& survivors) const;
  int refine(int from, int option);
  void refine_all(const std::vector<int>& survivors);
  void hold_out();
  void mark_frontier();
  bool known_dense_only(int index) const;

  const TuneProblem& problem_;
  std::mt19937_64 random_;
  int cases_;  // tuning cases that finalists are measured on
  TuneResult result_;
  std::vector<int> pool_;               // of result_.tried
  std::vector<double> option_pairs_;    // measured, all layers; 0: not yet
  std::map<std::size_t, double> rate_;  // seconds a pair, by method
  double trial_seconds_ = 0;            // of the last trials, smoothed
};

int Tuner::add(const std::string& name, const Assignment& layers) {
  for (std::size_t i = 0; i < result_.tried.size(); ++i)
    if (result_.tried[i].layers == layers) return static_cast<int>(i);
  result_.tried.push_back({name, layers, {}, {}, 0, false});
  return static_cast<int>(result_.tried.size()) - 1;
}

bool Tuner::known_dense_only(int index) const {
  const Assignment& layers = result_.tried[static_cast<std::size_t>(index)].layers;
  return std::all_of(layers.begin(), layers.end(), [](int option) { return option == kDense; });
}

bool Tuner::measure(int index, int cases, double until) {
  Tried& tried = result_.tried[static_cast<std::size_t>(index)];
  const AttentionPlan plan = result_.plan(tried, tried.name);
  while (static_cast<int>(tried.tuning.size()) < cases) {
    if (left(until) <= 0) {
      result_.out_of_time = true;
      return false;
    }
    const double before = problem_.elapsed();
    tried.tuning.push_back(problem_.measure(plan, static_cast<int>(tried.tuning.size())));
    const double took = problem_.elapsed() - before;
    trial_seconds_ = trial_seconds_ == 0 ? took : 0.8 * trial_seconds_ + 0.2 * took;
  }
  return true;
}

/// Seconds a pair of each method, from plans of one option; pairs of an option from its own plan.
void Tuner::calibrate() {
  std::map<std::size_t, std::vector<double>> rates;
  std::vector<double> all;
  option_pairs_.assign(result_.options.size(), 0.0);
  for (const Tried& tried : result_.tried) {
    const int option = tried.layers.front();
    const bool uniform = std::all_of(tried.layers.begin(), tried.layers.end(), [&](int o) { return o == option; });
    if (!uniform || tried.tuning.empty()) continue;
    double pairs = 0;
    for (const Trial& trial : tried.tuning) {
      pairs += trial.pairs / static_cast<double>(tried.tuning.size());
      if (trial.seconds <= 0 || trial.pairs <= 0) continue;
      all.push_back(trial.seconds / trial.pairs);
      rates[result_.options[static_cast<std::size_t>(option)].method.index()].push_back(all.back());
    }
    option_pairs_[static_cast<std::size_t>(option)] = pairs;
  }
  for (std::size_t method = 0; method < std::variant_size_v<AttentionMethod>; ++method)
    rate_[method] = rates.contains(method) ? median(rates[method]) : all.empty() ? 1.0 : median(all);
}

double Tuner::cost_of(const Assignment& layers) const {
  double cost = 0;
  for (const int option : layers) {
    const auto at = static_cast<std::size_t>(option);
    cost += rate_.at(result_.options[at].method.index()) * option_pairs_[at] / static_cast<double>(layers.size());
  }
  return cost;
}

void Tuner::update_costs() {
  calibrate();
  for (Tried& tried : result_.tried) tried.cost = cost_of(tried.layers);
}

/// By frontiers of cost and PSNR, what is above the target by more than a little counting no more; within a frontier,
/// the nearest to the target first.
std::vector<int> Tuner::ranked(std::vector<int> candidates, std::size_t cases) const {
  const auto psnr = [&](int i) {
    return std::min(mean_psnr(result_.tried[static_cast<std::size_t>(i)].tuning, cases), problem_.target + 2);
  };
  const auto cost = [&](int i) { return result_.tried[static_cast<std::size_t>(i)].cost; };
  std::vector<int> out;
  while (!candidates.empty()) {
    std::vector<int> front, rest;
    for (const int i : candidates) {
      const bool beaten = std::any_of(candidates.begin(), candidates.end(), [&](int j) {
        return cost(j) <= cost(i) && psnr(j) >= psnr(i) && (cost(j) < cost(i) || psnr(j) > psnr(i));
      });
      (beaten ? rest : front).push_back(i);
    }
    std::stable_sort(front.begin(), front.end(), [&](int a, int b) {
      return std::abs(psnr(a) - problem_.target) < std::abs(psnr(b) - problem_.target);
    });
    out.insert(out.end(), front.begin(), front.end());
    candidates = std::move(rest);
  }
  return out;
}

/// As many plans as the budget carries: options everywhere, and splits of two of them.
void Tuner::make_pool() {
  const double affordable = kHalvingUntil * problem_.budget / (2.5 * std::max(trial_seconds_, 1e-3));
  const int size = std::clamp(static_cast<int>(affordable), kSmallestPool, kLargestPool);
  const int splits = problem_.layers > 1 ? size / 4 : 0;
  for (const LayerOption& option : option_pool(problem_.layers, problem_.scales, size - splits, random_))
    result_.options.push_back(option);
  const auto options = static_cast<int>(result_.options.size());
  for (int option = 1; option < options; ++option)
    pool_.push_back(add(result_.options[static_cast<std::size_t>(option)].name,
                        Assignment(static_cast<std::size_t>(problem_.layers), option)));
  for (int i = 0; i < splits && options > 2; ++i) {
    const int below = 1 + static_cast<int>(drawn(random_, static_cast<std::size_t>(options) - 1));
    const int above = 1 + static_cast<int>(drawn(random_, static_cast<std::size_t>(options) - 1));
    const int bound = static_cast<int>(drawn(random_, static_cast<std::size_t>(problem_.layers) - 1));
    if (below == above) continue;
    const std::string name = fmt::format("{}|{}|{}", result_.options[static_cast<std::size_t>(below)].name, bound,
                                         result_.options[static_cast<std::size_t>(above)].name);
    if (const int index = add(name, split_at(problem_.layers, bound, below, above));
        std::find(pool_.begin(), pool_.end(), index) == pool_.end())
      pool_.push_back(index);
  }
}

std::vector<int> Tuner::halve() {
  std::vector<int> alive = pool_;
  int cases = 1;
  for (int round = 0;; ++round) {
    std::vector<int> measured;
    for (std::size_t i = 0; i < alive.size(); ++i) {
      tell(fmt::format("round {}: plan {} of {}, {} picture{}", round + 1, i + 1, alive.size(), cases,
                       cases == 1 ? "" : "s"));
      if (!measure(alive[i], cases, kHalvingUntil)) break;
      measured.push_back(alive[i]);
    }
    update_costs();
    // Where time ran out, those of this round are few: the ranking of the round before goes on behind them.
    std::vector<int> order = measured.empty() ? std::vector<int>{} : ranked(measured, static_cast<std::size_t>(cases));
    if (measured.size() < alive.size()) {
      for (const int i : alive)
        if (std::find(order.begin(), order.end(), i) == order.end() &&
            !result_.tried[static_cast<std::size_t>(i)].tuning.empty())
          order.push_back(i);
      order.resize(std::min<std::size_t>(order.size(), kSurvivors));
      return order;
    }
    if (static_cast<int>(order.size()) <= kSurvivors && cases >= cases_) return order;
    order.resize(std::max<std::size_t>(std::min<std::size_t>(order.size(), kSurvivors), order.size() / 2));
    alive = order;
    cases = std::min(2 * cases, cases_);
  }
}

/// The cheapest that holds the target on the tuning cases, else the best.
int Tuner::start_of_refinement(const std::vector<int>& survivors) const {
  int best = -1;
  const auto holds = [&](int i) {
    const Tried& tried = result_.tried[static_cast<std::size_t>(i)];
    return tried.psnr(tried.tuning.size()) >= problem_.target;
  };
  for (const int i : survivors) {
    if (best < 0) {
      best = i;
      continue;
    }
    const Tried &a = result_.tried[static_cast<std::size_t>(i)], &b = result_.tried[static_cast<std::size_t>(best)];
    const bool better = holds(i) && holds(best)   ? a.cost < b.cost
                        : holds(i) != holds(best) ? holds(i)
                                                  : a.psnr(a.tuning.size()) > b.psnr(b.tuning.size());
    if (better) best = i;
  }
  return best;
}

/// Puts `option` into the layers of `from` where it does least harm for what it saves (or most good for what it costs),
/// as many as the target allows (or needs). One picture tells layers apart, all tuning cases judge. Returns the plan
/// that came out, or `from`.
int Tuner::refine(int from, int option) {
  const Assignment base = result_.tried[static_cast<std::size_t>(from)].layers;
  const std::string name = result_.tried[static_cast<std::size_t>(from)].name;
  const bool cheaper = result_.tried[static_cast<std::size_t>(from)].psnr(
                           result_.tried[static_cast<std::size_t>(from)].tuning.size()) >= problem_.target;
  struct Change {
    std::size_t layer;
    double ratio;
  };
  std::vector<Change> changes;
  const double base_psnr = result_.tried[static_cast<std::size_t>(from)].tuning.front().psnr;
  for (std::size_t layer = 0; layer < base.size(); ++layer) {
    Assignment one = base;
    one[layer] = option;
    const double saved = cost_of(base) - cost_of(one);
    if (base[layer] == option || (saved > 0) != cheaper) continue;
    tell(fmt::format("layer {} of {}: {}", layer + 1, base.size(),
                     result_.options[static_cast<std::size_t>(option)].name));
    const int index =
        add(fmt::format("{}, layer {} {}", name, layer, result_.options[static_cast<std::size_t>(option)].name), one);
    if (!measure(index, 1, kRefiningUntil)) break;
    const double change = result_.tried[static_cast<std::size_t>(index)].tuning.front().psnr - base_psnr;
    changes.push_back({layer, change / std::max(std::abs(saved), 1e-12)});
  }
  std::stable_sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) { return a.ratio > b.ratio; });
  const auto with = [&](std::size_t count) {
    Assignment layers = base;
    for (std::size_t i = 0; i < count; ++i) layers[changes[i].layer] = option;
    return layers;
  };
  // Holding the target is taken to be monotone in the number of changed layers.
  std::size_t good = cheaper ? 0 : changes.size() + 1, bad = cheaper ? changes.size() + 1 : 0;
  int best = from;
  while ((good > bad ? good - bad : bad - good) > 1) {
    const std::size_t middle = (good + bad) / 2;
    tell(fmt::format("{} layers: {}", middle, result_.options[static_cast<std::size_t>(option)].name));
    const int index =
        add(fmt::format("{}, {} layers {}", name, middle, result_.options[static_cast<std::size_t>(option)].name),
            with(middle));
    if (!measure(index, cases_, kRefiningUntil)) break;
    if (result_.tried[static_cast<std::size_t>(index)].psnr(static_cast<std::size_t>(cases_)) >= problem_.target) {
      good = middle;
      best = index;
    } else {
      bad = middle;
    }
  }
  return best;
}

/// Options of the survivors, cheapest first where there is room above the target, else dearest first, dense the last.
void Tuner::refine_all(const std::vector<int>& survivors) {
  if (survivors.empty()) return;
  int current = start_of_refinement(survivors);
  if (!measure(current, cases_, kRefiningUntil)) return;
  std::vector<int> options;
  for (const int i : survivors)
    for (const int option : result_.tried[static_cast<std::size_t>(i)].layers)
      if (std::find(options.begin(), options.end(), option) == options.end()) options.push_back(option);
  // The cheapest of all, too: what no survivor has may do in some layers.
  int cheapest = -1;
  for (int option = 1; option < static_cast<int>(option_pairs_.size()); ++option)
    if (option_pairs_[static_cast<std::size_t>(option)] > 0 &&
        (cheapest < 0 || cost_of({option}) < cost_of({cheapest})))
      cheapest = option;
  if (cheapest > 0 && std::find(options.begin(), options.end(), cheapest) == options.end()) options.push_back(cheapest);
  const bool holds =
      result_.tried[static_cast<std::size_t>(current)].psnr(static_cast<std::size_t>(cases_)) >= problem_.target;
  if (!holds) options.push_back(kDense);
  std::sort(options.begin(), options.end(), [&](int a, int b) { return cost_of({a}) < cost_of({b}); });
  for (const int option : options) {
    if (left(kRefiningUntil) <= 0) break;
    current = refine(current, option);
    update_costs();
  }
}

/// The cheapest first, until one holds.
void Tuner::hold_out() {
  std::vector<int> order;
  for (std::size_t i = 0; i < result_.tried.size(); ++i) {
    const Tried& tried = result_.tried[i];
    const bool dense = known_dense_only(static_cast<int>(i));
    const std::size_t needed = std::min<std::size_t>(2, static_cast<std::size_t>(cases_));
    if (dense || (tried.tuning.size() >= needed && tried.psnr(tried.tuning.size()) >= problem_.target - kCloseEnough))
      order.push_back(static_cast<int>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return result_.tried[static_cast<std::size_t>(a)].cost < result_.tried[static_cast<std::size_t>(b)].cost;
  });
  const double affordable = left(1) / (3 * std::max(trial_seconds_, 1e-3));
  const int cases =
      std::clamp(static_cast<int>(affordable), std::min(2, problem_.held_out_cases), problem_.held_out_cases);
  result_.held_out_cases = cases;
  for (const int index : order) {
    Tried& tried = result_.tried[static_cast<std::size_t>(index)];
    const AttentionPlan plan = result_.plan(tried, tried.name);
    for (int i = 0; i < cases; ++i) {
      // Dense costs no search: it answers where time is out.
      if (left(1) <= 0 && !known_dense_only(index)) {
        result_.out_of_time = true;
        break;
      }
      tell(fmt::format("held out: picture {} of {}, {}", i + 1, cases, tried.name));
      tried.held_out.push_back(problem_.measure(plan, problem_.tuning_cases + i));
      if (i + 1 >= kEnoughToRefuse && tried.held_out_psnr() < problem_.target - kHopeless) break;
    }
    if (static_cast<int>(tried.held_out.size()) < cases) continue;
    if (tried.held_out_psnr() >= problem_.target) {
      result_.chosen = index;
      return;
    }
  }
}

void Tuner::mark_frontier() {
  for (Tried& tried : result_.tried) {
    const auto judged = [&](const Tried& t) { return static_cast<int>(t.held_out.size()) == result_.held_out_cases; };
    if (!judged(tried)) continue;
    tried.on_frontier = std::none_of(result_.tried.begin(), result_.tried.end(), [&](const Tried& other) {
      return judged(other) && other.cost <= tried.cost && other.held_out_psnr() >= tried.held_out_psnr() &&
             (other.cost < tried.cost || other.held_out_psnr() > tried.held_out_psnr());
    });
  }
}

TuneResult Tuner::run() {
  result_.options = {{"dense", DenseAttention{}, problem_.scales - 1}};
  const int dense = add("dense", Assignment(static_cast<std::size_t>(problem_.layers), kDense));
  tell("dense");
  measure(dense, 1, 1);
  make_pool();
  const std::vector<int> survivors = halve();
  refine_all(survivors);
  update_costs();
  hold_out();
  result_.dense_cost = result_.tried[static_cast<std::size_t>(dense)].cost;
  mark_frontier();
  const Assignment chosen =
      result_.chosen < 0 ? Assignment{} : result_.tried[static_cast<std::size_t>(result_.chosen)].layers;
  std::stable_sort(result_.tried.begin(), result_.tried.end(),
                   [](const Tried& a, const Tried& b) { return a.cost < b.cost; });
  for (std::size_t i = 0; i < result_.tried.size(); ++i)
    if (!chosen.empty() && result_.tried[i].layers == chosen) result_.chosen = static_cast<int>(i);
  return std::move(result_);
}

}  // namespace

double Tried::psnr(std::size_t cases) const { return cases == 0 ? NAN : mean_psnr(tuning, cases); }
double Tried::held_out_psnr() const { return held_out.empty() ? NAN : mean_psnr(held_out, held_out.size()); }

int first_tuned_scale(int scales) { return std::max(0, scales - 4); }

TuneResult tune(const TuneProblem& problem) {
  if (problem.tuning_cases < 1 || problem.held_out_cases < 1)
    throw Error(ErrorKind::usage,
                "tuning needs a picture to search on and another to judge by: give two prompts or more");
  if (problem.layers < 1 || problem.scales < 2)
    throw Error(ErrorKind::usage, "there is nothing to tune: the model has one scale");
  return Tuner(problem).run();
}

}  // namespace sparvar
