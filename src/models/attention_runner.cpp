#include "models/attention_runner.h"

#include <fmt/format.h>

#include <chrono>
#include <numeric>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "attention/probe.h"
#include "sparvar/error.h"

namespace sparvar {

struct AttentionRunner::Static {
  QueryTiles tiles;
  KeyLists lists;
  AttentionListsPtr prepared;
  double share = 1;
};

struct AttentionRunner::Followed {
  QueryTiles tiles;   // row by row
  ListRecipe recipe;  // as tokens and keys lie
  AttentionRecipePtr prepared;

  void prepare(Backend& backend, const KeyPlaces& places, int scale, ListRecipe made) {
    tiles = made.tiles;
    recipe = places.recipe(scale, std::move(made));
    prepared = backend.prepare_recipe(recipe);
  }
};

struct AttentionRunner::Probing {
  ProbeLayout layout;                // row by row
  std::vector<std::int32_t> probes;  // where they lie
  Followed lists;
};

namespace {

Tensor empty_choice(Backend& backend, const AttentionArgs& args, std::int64_t groups, std::int64_t keys) {
  return backend.empty(DType::i32, {args.q.dim(0) * args.q.dim(1), groups, keys});
}

/// Guidance may have ended since: the rows that are left are the first.
void keep_rows(CarriedKeys& carried, std::int64_t rows, std::int64_t heads) {
  if (rows * heads >= carried.choice.dim(0)) return;
  carried.choice = carried.choice.rows(0, rows * heads);
  if (carried.residual.defined()) carried.residual = carried.residual.rows(0, rows);
}

}  // namespace

AttentionRunner::AttentionRunner(Backend& backend, AttentionPlan plan, ScaleSchedule schedule, int layers,
                                 TokenOrder order)
    : backend_(backend),
      plan_(std::move(plan)),
      schedule_(std::move(schedule)),
      places_(schedule_, order),
      pairs_(schedule_.size()),
      seconds_(schedule_.size()),
      all_(schedule_.size()),
      decisions_(layers) {
  counted_ = backend_.zeros(DType::i64, {static_cast<std::int64_t>(schedule_.size())});
  for (int k = 0, keys = 0, all = 0; k < static_cast<int>(schedule_.size()); ++k) {
    const double tokens = schedule_[k].tokens();
    all += schedule_[k].tokens();
    keys_.push_back(keys += plan_.tokens_run(k, schedule_[k]));
    dense_share_.push_back(plan_.tokens_run(k, schedule_[k]) / tokens * keys / all);
  }
}

AttentionRunner::~AttentionRunner() = default;
AttentionRunner::AttentionRunner(AttentionRunner&&) noexcept = default;

double AttentionRunner::share_of_pairs(int scale) const {
  double pairs = pairs_[scale];
  if (all_[scale] > 0)
    pairs += static_cast<double>(backend_.download(counted_.rows(scale, scale + 1)).data<std::int64_t>()[0]) /
             static_cast<double>(all_[scale]);
  return pairs / static_cast<double>(decisions_.size());
}

void AttentionRunner::start(int scale) {
  pairs_[scale] = seconds_[scale] = 0;
  all_[scale] = 0;
  if (plan_.is_static()) return;
  Tensor count = counted_.rows(scale, scale + 1);
  backend_.fill_zero(count);
}

void AttentionRunner::release() {
  for (auto& decision : decisions_) decision.reset();
}

void AttentionRunner::carry(int layer, CarriedKeys keys) {
  decisions_[layer] = std::make_unique<CarriedKeys>(std::move(keys));
}

void AttentionRunner::run(int layer, int scale, AttentionArgs& args, const CarriedKeys& decided) {
  if (query_observer_) query_observer_(layer, scale, args);
  const auto start = std::chrono::steady_clock::now();
  const AttentionMethod& method = plan_.method(layer, scale);
  if (const auto* m = std::get_if<CslaAttention>(&method))
    pairs_[scale] += csla(*m, layer, args, scale);
  else if (const auto* m4 = std::get_if<Cs4aAttention>(&method))
    pairs_[scale] += cs4a(*m4, layer, args, scale, decided);
  else if (const auto* mp = std::get_if<ProbeAttention>(&method))
    pairs_[scale] += probe(*mp, layer, args, scale);
  else
    pairs_[scale] += dense(args, scale);
  if (!backend_.records())
    seconds_[scale] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double AttentionRunner::dense(AttentionArgs& args, int scale) {
  backend_.dense_attention(args, keys_[scale]);
  return dense_share_[scale];
}

double AttentionRunner::csla(const CslaAttention& method, int layer, AttentionArgs& args, int scale) {
  Static& known = csla_[{&method, scale}];
  if (!known.prepared) {
    known.tiles = csla_tiles(schedule_[scale], method);
    known.lists = csla_lists(schedule_, scale, method, known.tiles);
    known.share = sparvar::share_of_pairs(known.tiles, known.lists, keys_[scale]);
    known.prepared = backend_.prepare_lists(places_.tiles(scale, known.tiles), places_.lists(known.lists));
  }
  if (observer_) observer_(layer, scale, known.tiles, known.lists);
  backend_.attention(args, *known.prepared);
  return known.share;
}

void AttentionRunner::show(int layer, int scale, const Followed& followed, const Tensor& choice) const {
  if (!observer_) return;
  observer_(layer, scale, followed.tiles, places_.back(follow(followed.recipe, backend_.download(choice))));
}

void AttentionRunner::choose(int layer, int scale, AttentionArgs& args, const std::vector<std::int32_t>& rows,
                             const QueryTiles& groups, const std::vector<int>& counts, Tensor& choice) {
  backend_.attend_and_choose(args, rows, groups, keys_[scale], counts, choice);
  if (choice_observer_) choice_observer_(layer, scale, {args, rows, groups, keys_[scale], counts}, choice);
}

void AttentionRunner::attend(AttentionArgs& args, int scale, const AttentionRecipePtr& prepared, const Tensor& choice,
                             const Tensor& cache, int cache_scale) {
  Tensor count = counted_.rows(scale, scale + 1);
  if (cache.defined())
    backend_.attention_with_residual(args, *prepared, choice, count, cache, places_.map(cache_scale),
                                     places_.map(scale));
  else
    backend_.attention(args, *prepared, choice, count);
  all_[scale] = args.q.dim(0) * args.q.dim(1) * args.q.dim(2) * keys_[scale];
}

double AttentionRunner::cs4a(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale,
                             const CarriedKeys& decided) {
  if (scale <= method.decision_scale) return decide(method, layer, args, scale, decided);
  CarriedKeys* decision = decisions_[layer].get();
  if (decision == nullptr)
    throw Error(ErrorKind::usage,
                fmt::format("plan {}: layer {} carries keys at scale {}, but did not decide at scale {}", plan_.name,
                            layer, scale, method.decision_scale));
  keep_rows(*decision, args.q.dim(0), args.q.dim(1));
  Followed& known = cs4a_[{&method, scale}];
  if (!known.prepared)
    known.prepare(backend_, places_, scale,
                  carry_recipe(method, schedule_, scale, group_tiles(schedule_[scale], method.group),
                               static_cast<int>(decision->choice.dim(1)), static_cast<int>(decision->choice.dim(2))));
  show(layer, scale, known, decision->choice);
  attend(args, scale, known.prepared, decision->choice, decision->residual, method.decision_scale);
  return 0;  // counted on the device
}

double AttentionRunner::decide(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale,
                               const CarriedKeys& decided) {
  if (scale < method.decision_scale) return dense(args, scale);
  Followed& known = cs4a_[{&method, scale}];
  const std::vector<int> counts = counts_to_choose(method, schedule_);
  if (!known.prepared) {
    const QueryTiles tiles = group_tiles(schedule_[scale], method.group);
    std::vector<std::int32_t> own_group(tiles.count());
    std::iota(own_group.begin(), own_group.end(), 0);
    known.prepare(backend_, places_, scale,
                  {.tiles = tiles,
                   .keys = keys_[scale],
                   .chosen = counts.front(),
                   .group_of = std::move(own_group),
                   .map = {},
                   .fixed = {}});
  }
  args.statistics = backend_.empty(DType::f32, {args.q.dim(0), args.q.dim(1), args.q.dim(2), 2});
  auto decision = std::make_unique<CarriedKeys>(decided);
  if (!decision->choice.defined())
    decision->choice = empty_choice(backend_, args, known.recipe.tiles.count(), counts.front());
  choose(layer, scale, args, {}, known.recipe.tiles, counts, decision->choice);
  args.statistics = Tensor();
  if (method.residual) {
    AttentionArgs sparse = args;
    sparse.out = backend_.empty(args.out.dtype(), args.out.shape());
    attend(sparse, scale, known.prepared, decision->choice);
    if (!decision->residual.defined()) decision->residual = backend_.empty(backend_.product_type(), args.out.shape());
    backend_.subtract(args.out, sparse.out, decision->residual);
  }
  decisions_[layer] = std::move(decision);
  return 1;
}

double AttentionRunner::probe(const ProbeAttention& method, int layer, AttentionArgs& args, int scale) {
  const Grid grid = schedule_[scale];
  Probing& known = probing_[{&method, scale}];
  if (!known.lists.prepared) {
    known.layout = probe_layout(grid, method);
    known.probes = places_.queries(scale, known.layout.probe_rows);
    known.lists.prepare(backend_, places_, scale, probe_recipe(schedule_, scale, method, known.layout));
  }
  // The probes see all keys.
  const std::vector<std::int32_t>& probes = known.probes;
  const auto count = static_cast<std::int64_t>(probes.size());
  AttentionArgs dense_args = args;
  dense_args.out = backend_.empty(args.out.dtype(), {args.q.dim(0), count, args.q.dim(1), args.q.dim(3)});
  dense_args.statistics = backend_.empty(DType::f32, {args.q.dim(0), args.q.dim(1), count, 2});
  Tensor choice = empty_choice(backend_, args, known.layout.choosers.count(), known.lists.recipe.chosen);
  choose(layer, scale, dense_args, probes, known.layout.choosers, {known.lists.recipe.chosen}, choice);
  show(layer, scale, known.lists, choice);
  attend(args, scale, known.lists.prepared, choice);
  if (method.residual) {
    const Tensor residual = backend_.minus_rows(dense_args.out, args.out, probes);
    backend_.add_resized(args.out, residual, known.layout.probe_grid, places_.map(scale));
  }
  return static_cast<double>(count) / grid.tokens();
}

}  // namespace sparvar
