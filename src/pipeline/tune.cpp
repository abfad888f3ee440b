#include "pipeline/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kDense = 0;  // option 0 of every table, and plan 0
// Shares of the budget at which each stage ends. The rest is for the held-out cases.
constexpr double kHalvingUntil = 0.3, kSteppingUntil = 0.5, kRefiningUntil = 0.65, kCompletingUntil = 0.7;
constexpr int kSmallestPool = 8, kLargestPool = 64;
constexpr std::size_t kSurvivors = 4;  // of the halving
constexpr double kTrialsPerCase = 80;  // of the budget, for each case that finalists are measured on
constexpr int kFewestTuningCases = 6, kMostTuningCases = 24;
constexpr int kWantedHeldOutCases = 8;
constexpr int kFewestJudged = 4, kMostJudged = 16;

class Tuner {
 public:
  explicit Tuner(const TuneProblem& problem)
      : problem_(problem), board_(problem.scales, problem.cost), random_(problem.seed) {}

  TuneResult run();

 private:
  double left(double share) const { return share * problem_.budget - problem_.elapsed(); }
  void tell(std::string stage) {
    stage_ = std::move(stage);
    tell_again();
  }
  void tell_again() const {
    if (problem_.on_progress) problem_.on_progress(stage_, problem_.elapsed() / problem_.budget);
  }
  double tuned_psnr(int index) const { return board_.at(index).psnr(board_.at(index).tuning.size()); }
  bool holds(int index) const { return tuned_psnr(index) >= problem_.target; }
  bool complete(int index) const { return static_cast<int>(board_.at(index).tuning.size()) >= cases_; }
  void sort_by_distance(std::vector<int>& plans) const;
  /// Until the plan has trials of `cases` tuning cases; false where time ran out before.
  bool measure(int index, int cases, double until);
  bool measure_while_promising(int index, double until);

  void choose_cases();
  std::vector<int> make_pool();
  void halve(std::vector<int> alive);
  std::vector<Assignment> steps_from(int index);
  void step_around();
  int start_of_refinement() const;
  int refine(int from, int option);
  void refine_all();
  void complete_frontier();
  std::vector<int> to_judge() const;
  void hold_out(const std::vector<int>& judged);
  TuneResult result(const std::vector<int>& judged);

  const TuneProblem& problem_;
  TuneBoard board_;
  std::mt19937_64 random_;
  int cases_ = 1;  // tuning cases that finalists are measured on
  int held_out_cases_ = 0;
  bool out_of_time_ = false;
  std::string stage_;
  double trial_cost_ = 0;  // budget that the last trials took, smoothed
};

bool Tuner::measure(int index, int cases, double until) {
  const AttentionPlan plan = board_.plan(index);
  while (static_cast<int>(board_.at(index).tuning.size()) < cases) {
    if (left(until) <= 0) return false;
    tell_again();
    const double before = problem_.elapsed();
    const Trial trial = problem_.measure(plan, static_cast<int>(board_.at(index).tuning.size()));
    board_.tried[static_cast<std::size_t>(index)].tuning.push_back(trial);
    const double took = problem_.elapsed() - before;
    trial_cost_ = trial_cost_ == 0 ? took : 0.8 * trial_cost_ + 0.2 * took;
  }
  return true;
}

/// One picture, two, four, ... as long as nothing that was drawn on the same ones is cheaper and better.
bool Tuner::measure_while_promising(int index, double until) {
  for (int cases = 1;; cases = std::min(2 * cases, cases_)) {
    if (!measure(index, cases, until)) return false;
    board_.update_costs();
    if (cases >= cases_ || board_.beaten(index)) return true;
  }
}

void Tuner::sort_by_distance(std::vector<int>& plans) const {
  std::stable_sort(plans.begin(), plans.end(), [&](int a, int b) {
    return std::abs(tuned_psnr(a) - problem_.target) < std::abs(tuned_psnr(b) - problem_.target);
  });
}

/// The more the budget carries, the more pictures stand for all.
void Tuner::choose_cases() {
  const double wanted = problem_.budget / (kTrialsPerCase * std::max(trial_cost_, 1e-3));
  cases_ = std::min(problem_.tuning_cases,
                    static_cast<int>(std::clamp<double>(wanted, kFewestTuningCases, kMostTuningCases)));
}

/// As many plans as the budget carries: options everywhere, and splits of two of them.
std::vector<int> Tuner::make_pool() {
  const double trials = kHalvingUntil * problem_.budget / std::max(trial_cost_, 1e-3);
  const double affordable =
      (trials - static_cast<double>(kSurvivors + 1) * cases_) / 2.5;  // survivors, dense: all cases
  const int size = static_cast<int>(std::clamp<double>(affordable, kSmallestPool, kLargestPool));
  const int splits = problem_.layers > 1 ? size / 4 : 0;
  std::vector<int> pool;
  const auto add = [&](const Assignment& layers) {
    if (const int index = board_.add(layers); std::find(pool.begin(), pool.end(), index) == pool.end())
      pool.push_back(index);
  };
  for (const LayerOption& option : option_pool(problem_.layers, problem_.scales, size - splits, random_))
    add(Assignment(static_cast<std::size_t>(problem_.layers), board_.add_option(option)));
  const auto options = board_.options.size();
  for (int i = 0; i < splits && options > 2; ++i) {
    const int below = 1 + static_cast<int>(drawn(random_, options - 1));
    const int above = 1 + static_cast<int>(drawn(random_, options - 1));
    const int bound = static_cast<int>(drawn(random_, static_cast<std::size_t>(problem_.layers) - 1));
    if (below != above) add(split_at(problem_.layers, bound, below, above));
  }
  return pool;
}

/// All on one picture, the better half on two, ... until few are left that have all tuning cases.
void Tuner::halve(std::vector<int> alive) {
  for (int cases = 1, round = 1;; cases = std::min(2 * cases, cases_), ++round) {
    for (std::size_t i = 0; i < alive.size(); ++i) {
      tell(fmt::format("round {}: plan {} of {}, {} picture{}", round, i + 1, alive.size(), cases,
                       cases == 1 ? "" : "s"));
      if (measure(alive[i], cases, kHalvingUntil)) continue;
      out_of_time_ = true;
      board_.update_costs();
      return;
    }
    board_.update_costs();
    if (alive.size() <= kSurvivors && cases >= cases_) return;
    alive = board_.ranked(alive, static_cast<std::size_t>(cases), problem_.target);
    alive.resize(std::max(std::min(alive.size(), kSurvivors), alive.size() / 2));
  }
}

/// Every plan one step away: another value of one parameter in the layers that share it, or a bound moved by a layer.
std::vector<Assignment> Tuner::steps_from(int index) {
  const Assignment base = board_.at(index).layers;
  std::vector<Assignment> out;
  for (const int option : std::set<int>(base.begin(), base.end()))
    for (const LayerOption& changed : neighbours(board_.options[static_cast<std::size_t>(option)], problem_.scales)) {
      Assignment moved = base;
      std::replace(moved.begin(), moved.end(), option, board_.add_option(changed));
      out.push_back(std::move(moved));
    }
  for (const LayerRun& run : runs_of(base)) {
    if (run.first == 0) continue;
    const auto first = static_cast<std::size_t>(run.first);
    for (const bool up : {false, true}) {
      Assignment moved = base;
      moved[up ? first : first - 1] = base[up ? first - 1 : first];
      out.push_back(std::move(moved));
    }
  }
  for (std::size_t i = out.size(); i > 1; --i) std::swap(out[i - 1], out[drawn(random_, i)]);  // time may run out
  return out;
}

/// Steps from the plans of the frontier, the nearest to the target first.
void Tuner::step_around() {
  std::set<int> done = {kDense};
  while (left(kSteppingUntil) > 0) {
    std::vector<int> from = board_.frontier(1);
    std::erase_if(from, [&](int index) { return done.contains(index); });
    if (from.empty()) return;
    sort_by_distance(from);
    const int base = from.front();
    if (!complete(base)) {  // it may be there by luck
      tell("steps: " + board_.at(base).name);
      if (!measure_while_promising(base, kSteppingUntil)) return;
      if (board_.beaten(base)) done.insert(base);
      continue;
    }
    done.insert(base);
    const std::vector<Assignment> moves = steps_from(base);
    for (std::size_t i = 0; i < moves.size(); ++i) {
      tell(fmt::format("step {} of {} from {}", i + 1, moves.size(), board_.at(base).name));
      if (!measure_while_promising(board_.add(moves[i]), kSteppingUntil)) return;
    }
  }
}

/// The cheapest that holds the target on all tuning cases, else the best that is sparse; -1: none.
int Tuner::start_of_refinement() const {
  int best = -1;
  for (const int i : board_.frontier(static_cast<std::size_t>(cases_))) {  // the cheapest first, so the best comes last
    if (board_.dense(i)) continue;
    best = i;
    if (holds(i)) break;
  }
  return best;
}

/// Puts `option` into the layers of `from` where it does least harm for what it saves (or most good for what it costs),
/// as many as the target allows (or needs). One picture tells layers apart, all tuning cases judge. Returns the plan
/// that came out, or `from`.
int Tuner::refine(int from, int option) {
  const Assignment base = board_.at(from).layers;
  const std::string& name = board_.options[static_cast<std::size_t>(option)].name;
  const bool cheaper = holds(from);
  struct Change {
    std::size_t layer;
    double ratio;
  };
  std::vector<Change> changes;
  const double base_psnr = board_.at(from).tuning.front().psnr;
  for (std::size_t layer = 0; layer < base.size(); ++layer) {
    Assignment one = base;
    one[layer] = option;
    const double saved = board_.cost_of(base) - board_.cost_of(one);
    if (base[layer] == option || (saved > 0) != cheaper) continue;
    tell(fmt::format("layer {} of {}: {}", layer + 1, base.size(), name));
    const int index = board_.add(one);
    if (!measure(index, 1, kRefiningUntil)) break;
    const double change = board_.at(index).tuning.front().psnr - base_psnr;
    changes.push_back({layer, change / std::max(std::abs(saved), 1e-12)});
  }
  std::stable_sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) { return a.ratio > b.ratio; });
  // Holding the target is taken to be monotone in the number of changed layers.
  std::size_t good = cheaper ? 0 : changes.size() + 1, bad = cheaper ? changes.size() + 1 : 0;
  int best = from;
  while ((good > bad ? good - bad : bad - good) > 1) {
    const std::size_t middle = (good + bad) / 2;
    tell(fmt::format("{} layers: {}", middle, name));
    Assignment layers = base;
    for (std::size_t i = 0; i < middle; ++i) layers[changes[i].layer] = option;
    const int index = board_.add(layers);
    if (!measure(index, cases_, kRefiningUntil)) break;
    if (holds(index)) {
      good = middle;
      best = index;
    } else {
      bad = middle;
    }
  }
  return best;
}

/// Options of the plans near the target, cheapest first where there is room above it, else dearest first, dense last.
void Tuner::refine_all() {
  int current = start_of_refinement();
  if (current < 0) return;
  std::vector<int> near = board_.frontier(static_cast<std::size_t>(cases_));
  sort_by_distance(near);
  near.resize(std::min(near.size(), kSurvivors));
  std::set<int> options;
  for (const int i : near) options.insert(board_.at(i).layers.begin(), board_.at(i).layers.end());
  // The cheapest of all, too: what is no good everywhere may do in some layers.
  int cheapest = -1;
  for (int option = 1; option < static_cast<int>(board_.options.size()); ++option)
    if (board_.option_measured(option) && (cheapest < 0 || board_.cost_of({option}) < board_.cost_of({cheapest})))
      cheapest = option;
  if (cheapest > 0) options.insert(cheapest);
  if (!holds(current)) options.insert(kDense);
  std::vector<int> order(options.begin(), options.end());
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return board_.cost_of({a}) < board_.cost_of({b}); });
  for (const int option : order) {
    if (left(kRefiningUntil) <= 0) break;
    current = refine(current, option);
    board_.update_costs();
  }
}

/// What nothing beats so far is drawn on all tuning cases, the nearest to the target first, until nothing is left that
/// is there by luck with few pictures.
void Tuner::complete_frontier() {
  while (left(kCompletingUntil) > 0) {
    std::vector<int> open = board_.frontier(1);
    std::erase_if(open, [&](int index) { return complete(index); });
    if (open.empty()) return;
    sort_by_distance(open);
    tell("frontier: " + board_.at(open.front()).name);
    if (!measure_while_promising(open.front(), kCompletingUntil)) return;
  }
}

/// The frontier of what has all tuning cases; where there is no such plan, of what there is. As many as held-out
/// pictures can be paid for, dense always.
std::vector<int> Tuner::to_judge() const {
  std::vector<int> frontier = board_.frontier(static_cast<std::size_t>(cases_));
  std::erase(frontier, kDense);
  if (frontier.empty()) {
    frontier = board_.frontier(1);
    std::erase(frontier, kDense);
  }
  const double affordable =
      left(1) / (std::max(trial_cost_, 1e-3) * std::min(kWantedHeldOutCases, problem_.held_out_cases));
  const auto most = static_cast<std::size_t>(std::clamp<double>(affordable, kFewestJudged, kMostJudged));
  const auto cheapest = std::find_if(frontier.begin(), frontier.end(), [&](int i) { return holds(i); });
  const int kept = cheapest == frontier.end() ? -1 : *cheapest;
  frontier = thinned(board_, std::move(frontier), most, kept);
  sort_by_distance(frontier);
  frontier.insert(frontier.begin(), kDense);
  return frontier;
}

/// Picture by picture, all plans on each, so that they stay comparable whenever time runs out. Of the first picture
/// what was drawn in time counts; dense costs no search, it answers even where time is out.
void Tuner::hold_out(const std::vector<int>& judged) {
  for (int i = 0; i < problem_.held_out_cases; ++i) {
    for (const int index : judged) {
      if (left(1) <= 0 && (i > 0 || index != kDense)) return;
      tell(
          fmt::format("held out: picture {} of at most {}, {}", i + 1, problem_.held_out_cases, board_.at(index).name));
      board_.tried[static_cast<std::size_t>(index)].held_out.push_back(
          problem_.measure(board_.plan(index), problem_.tuning_cases + i));
      held_out_cases_ = std::max(held_out_cases_, i == 0 ? 1 : 0);
    }
    held_out_cases_ = i + 1;
  }
}

/// By cost, with the frontier of the held-out cases marked.
TuneResult Tuner::result(const std::vector<int>& judged) {
  TuneResult out;
  out.options = board_.options;
  out.tuning_cases = cases_;
  out.held_out_cases = held_out_cases_;
  out.out_of_time = out_of_time_;
  out.dense_cost = board_.at(kDense).cost;
  for (const int index : judged) {
    Tried& plan = board_.tried[static_cast<std::size_t>(index)];
    plan.held_out.resize(std::min(plan.held_out.size(), static_cast<std::size_t>(held_out_cases_)));
    plan.judged = static_cast<int>(plan.held_out.size()) == held_out_cases_;
  }
  out.tried = board_.tried;
  std::stable_sort(out.tried.begin(), out.tried.end(), [](const Tried& a, const Tried& b) { return a.cost < b.cost; });
  for (std::size_t i = 0; i < out.tried.size(); ++i) {
    Tried& plan = out.tried[i];
    if (!plan.judged) continue;
    out.judged.push_back(static_cast<int>(i));
    plan.on_frontier = std::none_of(out.tried.begin(), out.tried.end(), [&](const Tried& other) {
      return other.judged && other.cost <= plan.cost && other.held_out_psnr() >= plan.held_out_psnr() &&
             (other.cost < plan.cost || other.held_out_psnr() > plan.held_out_psnr());
    });
    if (out.chosen < 0 && plan.held_out_psnr() >= problem_.target) out.chosen = static_cast<int>(i);
  }
  if (out.chosen < 0) out.chosen = out.judged.back();  // dense attention is the dearest
  return out;
}

TuneResult Tuner::run() {
  board_.add(Assignment(static_cast<std::size_t>(problem_.layers), kDense));
  tell("dense");
  measure(kDense, 1, 1);
  choose_cases();
  halve(make_pool());
  step_around();
  refine_all();
  board_.update_costs();
  complete_frontier();
  board_.update_costs();
  const std::vector<int> judged = to_judge();
  hold_out(judged);
  return result(judged);
}

}  // namespace

TuneResult tune(const TuneProblem& problem) {
  if (problem.tuning_cases < 1 || problem.held_out_cases < 1)
    throw Error(ErrorKind::usage,
                "tuning needs a picture to search on and another to judge by: give two prompts or more");
  if (problem.layers < 1 || problem.scales < 2)
    throw Error(ErrorKind::usage, "there is nothing to tune: the model has one scale");
  return Tuner(problem).run();
}

}  // namespace sparvar
