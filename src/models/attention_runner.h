// Executes an attention plan: for each (layer, scale) the lists it asks for, the kernel, and the residual.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "attention/token_order.h"
#include "backend/backend.h"
#include "sparvar/attention_plan.h"

namespace sparvar {

/// Sees the lists of every sparse (layer, scale) as they are executed, tokens and keys row by row whatever their order
/// in memory; `lists` holds one list for all batch entries and heads, or one for each.
using ListObserver = std::function<void(int layer, int scale, const QueryTiles& tiles, const KeyLists& lists)>;

/// Sees the queries and keys of every (layer, scale) before attention runs, in the runner's order.
using QueryObserver = std::function<void(int layer, int scale, const AttentionArgs& args)>;

/// A choice of keys as it was made: of the queries `rows` of a dense pass (all where empty), in `groups` of those.
struct Choosing {
  const AttentionArgs& args;  // of the pass, with its statistics; q holds all queries
  const std::vector<std::int32_t>& rows;
  const QueryTiles& groups;
  int keys;
  const std::vector<int>& counts;  // as of Backend::select_keys
};

/// Sees what every layer chose, I32 [B * H, groups, counts[0]] of the backend, before anything follows it, and may put
/// another choice in its place: what devices choose differently, where keys weigh all but the same, then stays apart
/// from what they compute.
using ChoiceObserver = std::function<void(int layer, int scale, const Choosing& of, Tensor& choice)>;

/// What a layer carries from its CS4A decision scale to the scales above.
struct CarriedKeys {
  Tensor choice;    // I32 [B * H, groups, keys chosen]
  Tensor residual;  // [B, n_S, H, D]: dense minus sparse; undefined where the method adds none
};

class AttentionRunner {
 public:
  /// `order`: how the queries and keys of each scale lie, in every call.
  AttentionRunner(Backend& backend, AttentionPlan plan, ScaleSchedule schedule, int layers, TokenOrder order = {});
  ~AttentionRunner();
  AttentionRunner(AttentionRunner&&) noexcept;

  void observe(ListObserver observer) { observer_ = std::move(observer); }
  void observe_queries(QueryObserver observer) { query_observer_ = std::move(observer); }
  void observe_choices(ChoiceObserver observer) { choice_observer_ = std::move(observer); }
  /// Forgets the figures of the scale: it runs (again). A part of the scale's program.
  void start(int scale);
  /// Lets go of what is kept between scales, once every program of a walk was recorded.
  void release();
  /// Fills args.out for the queries of `scale`; k and v hold the keys of scales 0 .. scale. Scales must come in order.
  /// `decided`: where what is decided goes, or undefined for memory of the runner's own.
  void run(int layer, int scale, AttentionArgs& args, const CarriedKeys& decided = {});
  /// Puts back what run() decided at the decision scale of a layer, before the scales above: for callers that keep it
  /// themselves.
  void carry(int layer, CarriedKeys keys);
  /// Pairs computed over pairs there are, and seconds spent, at the scale, all layers together. A device that records
  /// programs leaves the seconds at 0.
  double share_of_pairs(int scale) const;
  double seconds(int scale) const { return seconds_[scale]; }

 private:
  struct Static;    // tiles and lists that depend on the schedule only
  struct Followed;  // a recipe for lists, which depends on the schedule only
  struct Probing;   // the part of a probe plan that depends on the schedule only
  double dense(AttentionArgs& args, int scale);
  /// A dense pass of which the groups choose keys.
  void choose(int layer, int scale, AttentionArgs& args, const std::vector<std::int32_t>& rows,
              const QueryTiles& groups, const std::vector<int>& counts, Tensor& choice);
  /// Every tile attends to its list made of the choice; the pairs are counted on the device.
  void attend(AttentionArgs& args, int scale, const AttentionRecipePtr& prepared, const Tensor& choice,
              const Tensor& cache = {}, int cache_scale = 0);
  void show(int layer, int scale, const Followed& followed, const Tensor& choice) const;
  double csla(const CslaAttention& method, int layer, AttentionArgs& args, int scale);
  double cs4a(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale, const CarriedKeys& decided);
  double probe(const ProbeAttention& method, int layer, AttentionArgs& args, int scale);
  double decide(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale, const CarriedKeys& decided);

  Backend& backend_;
  ListObserver observer_;
  QueryObserver query_observer_;
  ChoiceObserver choice_observer_;
  AttentionPlan plan_;
  ScaleSchedule schedule_;
  KeyPlaces places_;
  std::vector<int> keys_;            // keys of scales 0 .. k
  std::vector<double> dense_share_;  // of pairs that dense attention computes; less than 1 where tokens are pruned
  std::vector<double> pairs_, seconds_;
  Tensor counted_;                 // I64 [scales]: pairs of lists that are made as they run, all layers together
  std::vector<std::int64_t> all_;  // queries x keys x heads of such a scale
  std::map<std::pair<const void*, int>, Static> csla_;  // by method and scale, as those below
  std::map<std::pair<const void*, int>, Followed> cs4a_;
  std::map<std::pair<const void*, int>, Probing> probing_;
  std::vector<std::unique_ptr<CarriedKeys>> decisions_;  // per layer
};

}  // namespace sparvar
