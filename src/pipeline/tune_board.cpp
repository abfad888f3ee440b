#include "pipeline/tune_board.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pipeline/median.h"

namespace sparvar {
namespace {

constexpr double kEnough = 2;  // dB above the target: more is not worth anything

double mean_psnr(const std::vector<Trial>& trials, std::size_t count) {
  if (count == 0) return NAN;
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += trials[i].psnr;
  return sum / static_cast<double>(count);
}

double mean_pairs(const std::vector<Trial>& trials) {
  double sum = 0;
  for (const Trial& trial : trials) sum += trial.pairs;
  return sum / static_cast<double>(trials.size());
}

/// Does a plan of this cost and quality leave no reason for another?
bool beats(double cost, double psnr, double other_cost, double other_psnr) {
  return cost <= other_cost && psnr >= other_psnr && (cost < other_cost || psnr > other_psnr);
}

}  // namespace

double Tried::psnr(std::size_t cases) const { return mean_psnr(tuning, cases); }
double Tried::held_out_psnr() const { return mean_psnr(held_out, held_out.size()); }
double Tried::held_out_worst() const {
  double worst = held_out.empty() ? NAN : held_out.front().psnr;
  for (const Trial& trial : held_out) worst = std::min(worst, trial.psnr);
  return worst;
}

TuneBoard::TuneBoard(int scales, TuneCost cost)
    : options{{"dense", DenseAttention{}, scales - 1}}, cost_(cost), pairs_(1) {}

int TuneBoard::add(const Assignment& layers) {
  for (std::size_t i = 0; i < tried.size(); ++i)
    if (tried[i].layers == layers) return static_cast<int>(i);
  Tried plan;
  plan.name = name_of(options, layers);
  plan.layers = layers;
  tried.push_back(std::move(plan));
  return static_cast<int>(tried.size()) - 1;
}

int TuneBoard::add_option(const LayerOption& option) {
  const auto found = std::find(options.begin(), options.end(), option);
  if (found != options.end()) return static_cast<int>(found - options.begin());
  options.push_back(option);
  pairs_.push_back(0);
  return static_cast<int>(options.size()) - 1;
}

bool TuneBoard::dense(int index) const {
  return std::all_of(at(index).layers.begin(), at(index).layers.end(), [](int option) { return option == 0; });
}

/// Of every option: from a plan with it everywhere, else from one in which it is the only one not known yet.
void TuneBoard::count_pairs() {
  std::fill(pairs_.begin(), pairs_.end(), 0.0);
  const auto learn = [&](const Tried& plan, bool uniform) {
    const auto layers = static_cast<int>(plan.layers.size());
    int unknown = -1, count = 0;
    double known = 0;
    for (const int option : plan.layers) {
      const double pairs = pairs_[static_cast<std::size_t>(option)];
      known += pairs / layers;
      if (pairs > 0) continue;
      if (unknown >= 0 && unknown != option) return false;
      unknown = option;
      ++count;
    }
    if (unknown < 0 || plan.tuning.empty() || (uniform && count < layers)) return false;
    const double pairs = (mean_pairs(plan.tuning) - known) * layers / count;
    if (pairs <= 0) return false;
    pairs_[static_cast<std::size_t>(unknown)] = pairs;
    return true;
  };
  for (const Tried& plan : tried) (void)learn(plan, true);
  for (bool learned = true; learned;) {
    learned = false;
    for (const Tried& plan : tried) learned = learn(plan, false) || learned;
  }
}

void TuneBoard::update_costs() {
  count_pairs();
  std::map<std::size_t, std::vector<double>> rates;
  std::vector<double> all;
  for (const Tried& plan : tried) {
    const std::vector<LayerRun> runs = runs_of(plan.layers);
    if (runs.size() != 1) continue;
    for (const Trial& trial : plan.tuning) {
      if (trial.seconds <= 0 || trial.pairs <= 0 || cost_ == TuneCost::pairs) continue;
      all.push_back(trial.seconds / trial.pairs);
      rates[options[static_cast<std::size_t>(runs.front().option)].method.index()].push_back(all.back());
    }
  }
  for (std::size_t method = 0; method < std::variant_size_v<AttentionMethod>; ++method)
    rate_[method] = rates.contains(method) ? median(rates[method]) : all.empty() ? 1.0 : median(all);
  for (Tried& plan : tried) plan.cost = cost_of(plan.layers);
}

double TuneBoard::cost_of(const Assignment& layers) const {
  double cost = 0;
  for (const int option : layers) {
    const auto at = static_cast<std::size_t>(option);
    cost += rate_.at(options[at].method.index()) * pairs_[at] / static_cast<double>(layers.size());
  }
  return cost;
}

bool TuneBoard::beaten(int index) const {
  const Tried& plan = at(index);
  return std::any_of(tried.begin(), tried.end(), [&](const Tried& other) {
    const std::size_t both = std::min(plan.tuning.size(), other.tuning.size());
    return both > 0 && beats(other.cost, other.psnr(both), plan.cost, plan.psnr(both));
  });
}

std::vector<int> TuneBoard::frontier(std::size_t cases) const {
  const auto counts = [&](const Tried& plan) { return plan.tuning.size() >= cases && !plan.tuning.empty(); };
  std::vector<int> out;
  for (std::size_t i = 0; i < tried.size(); ++i) {
    const Tried& plan = tried[i];
    if (!counts(plan)) continue;
    const bool worse = std::any_of(tried.begin(), tried.end(), [&](const Tried& other) {
      const std::size_t both = std::min(plan.tuning.size(), other.tuning.size());
      return counts(other) && beats(other.cost, other.psnr(both), plan.cost, plan.psnr(both));
    });
    if (!worse) out.push_back(static_cast<int>(i));
  }
  std::stable_sort(out.begin(), out.end(), [&](int a, int b) { return at(a).cost < at(b).cost; });
  return out;
}

std::vector<int> TuneBoard::ranked(std::vector<int> candidates, std::size_t cases, double target) const {
  const auto psnr = [&](int i) { return std::min(at(i).psnr(cases), target + kEnough); };
  std::vector<int> out;
  while (!candidates.empty()) {
    std::vector<int> front, rest;
    for (const int i : candidates) {
      const bool worse = std::any_of(candidates.begin(), candidates.end(),
                                     [&](int j) { return beats(at(j).cost, psnr(j), at(i).cost, psnr(i)); });
      (worse ? rest : front).push_back(i);
    }
    std::stable_sort(front.begin(), front.end(),
                     [&](int a, int b) { return std::abs(psnr(a) - target) < std::abs(psnr(b) - target); });
    out.insert(out.end(), front.begin(), front.end());
    candidates = std::move(rest);
  }
  return out;
}

std::vector<int> thinned(const TuneBoard& board, std::vector<int> frontier, std::size_t most, int kept) {
  const auto psnr = [&](std::size_t place) {
    const Tried& plan = board.at(frontier[place]);
    return plan.psnr(plan.tuning.size());
  };
  while (frontier.size() > std::max<std::size_t>(most, 3)) {
    std::size_t least = 0;
    double gap = std::numeric_limits<double>::infinity();
    for (std::size_t i = 1; i + 1 < frontier.size(); ++i) {
      if (frontier[i] == kept || std::abs(psnr(i + 1) - psnr(i - 1)) >= gap) continue;
      gap = std::abs(psnr(i + 1) - psnr(i - 1));
      least = i;
    }
    if (least == 0) break;
    frontier.erase(frontier.begin() + static_cast<std::ptrdiff_t>(least));
  }
  return frontier;
}

}  // namespace sparvar
