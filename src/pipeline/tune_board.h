// What a search has tried: plans with their pictures, what each costs, and which of them nothing beats.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "pipeline/tune_space.h"

namespace sparvar {

/// One picture with a plan, against the dense one. Seconds and pairs: of attention, all layers, at the scales from
/// first_tuned_scale on. Seconds 0: not known, pairs decide.
struct Trial {
  double psnr = 0;  // finite
  double seconds = 0;
  double pairs = 0;
  double share = 1;     // of query-key pairs at the last three scales, as pairs_computed
  double speed_up = 0;  // of the whole picture over the dense one, on the same device; 0: not known
};

/// A plan that was tried.
struct Tried {
  std::string name;
  Assignment layers;
  std::vector<Trial> tuning, held_out;   // by case, as far as they were measured
  double cost = 0;                       // of attention, by the cost model; seconds where times are known
  bool judged = false;                   // on all held-out cases that the budget allowed
  bool on_frontier = false;              // of those that were judged: nothing is both cheaper and better
  double psnr(std::size_t cases) const;  // mean of the first tuning cases; NaN of none
  double held_out_psnr() const;          // mean; NaN where nothing was held out
  double held_out_worst() const;         // NaN where nothing was held out
};

enum class TuneCost { seconds, pairs };

class TuneBoard {
 public:
  TuneBoard(int scales, TuneCost cost);

  /// The plan with these options, new or known: its place in `tried`.
  int add(const Assignment& layers);
  /// The option, new or known: its place in `options`.
  int add_option(const LayerOption& option);
  bool dense(int index) const;
  const Tried& at(int index) const { return tried[static_cast<std::size_t>(index)]; }
  AttentionPlan plan(int index) const { return plan_of(at(index).name, options, at(index).layers); }

  /// Costs of all plans from what was measured: pairs of each option, times the median seconds a pair of its method.
  void update_costs();
  double cost_of(const Assignment& layers) const;
  bool option_measured(int option) const { return pairs_[static_cast<std::size_t>(option)] > 0; }

  /// Is something at most as expensive, and at least as good on the pictures that both were drawn on?
  bool beaten(int index) const;
  /// Those with `cases` tuning pictures or more that nothing else with as many beats, by cost.
  std::vector<int> frontier(std::size_t cases) const;
  /// By frontiers of cost and PSNR on `cases` pictures, what is above the target by more than a little counting no
  /// more; within a frontier, the nearest to the target first.
  std::vector<int> ranked(std::vector<int> candidates, std::size_t cases, double target) const;

  std::vector<LayerOption> options;  // 0 is dense
  std::vector<Tried> tried;          // 0 is dense

 private:
  void count_pairs();

  TuneCost cost_;
  std::vector<double> pairs_;           // by option: of a plan with it in all layers; 0: not measured
  std::map<std::size_t, double> rate_;  // seconds a pair, by method
};

/// Drops those whose neighbours on the list are closest in PSNR until `most` are left. The first, the last and `kept`
/// stay.
std::vector<int> thinned(const TuneBoard& board, std::vector<int> frontier, std::size_t most, int kept);

}  // namespace sparvar
