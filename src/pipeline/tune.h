// Finds the frontier of cost and PSNR among attention plans, and on it the cheapest plan that holds a target: a pool of
// plans halved again and again, steps around the best, then layer by layer; held-out pictures judge what is left.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/tune_board.h"

namespace sparvar {

struct TuneProblem {
  int layers = 0;
  int scales = 0;
  double target = 30;      // mean PSNR in dB
  int tuning_cases = 0;    // cases [0, tuning_cases) are searched on
  int held_out_cases = 0;  // cases behind them judge what was found
  double budget = 600;     // by `elapsed`, in its unit; a trial that has begun is finished
  std::uint64_t seed = 0;
  TuneCost cost = TuneCost::seconds;
  std::function<Trial(const AttentionPlan& plan, int index)> measure;
  /// Seconds, or pictures drawn so far: with the latter and TuneCost::pairs the result depends on the seed alone.
  std::function<double()> elapsed;
  std::function<void(const std::string& stage, double share_of_budget)> on_progress;
};

struct TuneResult {
  std::vector<LayerOption> options;  // of all assignments
  std::vector<Tried> tried;          // by cost, the cheapest first
  std::vector<int> judged;           // the frontier of the search, by cost: those with figures of all held_out_cases
  int chosen = -1;                   // of `judged`, the cheapest that holds the target on the held-out cases
  int tuning_cases = 0;              // the first ones, that finalists were measured on
  int held_out_cases = 0;            // that the budget allowed
  double dense_cost = 0;
  bool out_of_time = false;  // before the pool was halved down: not all of it was compared
  AttentionPlan plan(const Tried& of, const std::string& name) const { return plan_of(name, options, of.layers); }
};

/// Dense attention is among what is tried, so there is always an answer. Throws Error(usage) without a case to search
/// on and another to judge by.
TuneResult tune(const TuneProblem& problem);

}  // namespace sparvar
