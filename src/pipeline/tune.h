// Finds the cheapest attention plan that holds a PSNR: successive halving over a pool of plans, then layer by layer.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/tune_space.h"

namespace sparvar {

/// One picture with a plan, against the dense one. Seconds and pairs: of attention, all layers, at the scales from
/// TuneProblem::first_scale on. Seconds 0: not known, pairs decide.
struct Trial {
  double psnr = 0;  // finite
  double seconds = 0;
  double pairs = 0;
};

struct TuneProblem {
  int layers = 0;
  int scales = 0;
  double target = 30;      // mean PSNR in dB
  int tuning_cases = 0;    // cases [0, tuning_cases) are searched on
  int held_out_cases = 0;  // cases behind them judge what was found
  double budget = 600;     // seconds by `elapsed`; a trial that has begun is finished
  std::uint64_t seed = 0;
  std::function<Trial(const AttentionPlan& plan, int index)> measure;
  std::function<double()> elapsed;
  std::function<void(const std::string& stage, double share_of_budget)> on_progress;
};

/// A plan that was tried.
struct Tried {
  std::string name;
  Assignment layers;
  std::vector<Trial> tuning, held_out;   // by case, as far as they were measured
  double cost = 0;                       // of attention, by the cost model; seconds where times are known
  bool on_frontier = false;              // of what was held out: nothing is both cheaper and better
  double psnr(std::size_t cases) const;  // mean of the first tuning cases
  double held_out_psnr() const;          // mean; NaN where nothing was held out
};

struct TuneResult {
  std::vector<LayerOption> options;  // of all assignments
  std::vector<Tried> tried;          // by cost, the cheapest first
  int chosen = -1;                   // the cheapest that holds the target on the held-out cases
  int held_out_cases = 0;            // that the budget allowed
  double dense_cost = 0;
  bool out_of_time = false;  // the search was cut short
  AttentionPlan plan(const Tried& of, const std::string& name) const { return plan_of(name, options, of.layers); }
};

/// First scale whose attention is counted: no plan of the search is sparse before it.
int first_tuned_scale(int scales);

/// Dense attention is among what is tried, so there is always an answer. Throws Error(usage) without a case to search
/// on and another to judge by.
TuneResult tune(const TuneProblem& problem);

}  // namespace sparvar
