#include "models/attention_runner.h"

#include <fmt/format.h>

#include <chrono>

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

struct AttentionRunner::Decision {
  Selection selection;
  Tensor cache;  // f32 [B, n_S, H, D]: dense minus sparse

  /// Guidance may have ended since: the rows that are left are the first.
  void keep(std::int64_t rows, std::int64_t heads) {
    const auto lists = static_cast<int>(rows * heads);
    if (lists >= selection.lists) return;
    selection.lists = lists;
    selection.keys.resize(static_cast<std::size_t>(lists) * static_cast<std::size_t>(selection.groups) *
                          static_cast<std::size_t>(selection.count));
    if (cache.defined()) cache = cache.rows(0, rows);
  }
};

namespace {

constexpr int kDenseTile = 64;

/// Lists of the decision scale itself: the selected keys of each group.
KeyLists lists_of(const Selection& selection, int keys) {
  return build_lists(selection.lists, selection.groups, keys, [&](int list, int group, KeySet& set) {
    for (int i = 0; i < selection.count; ++i) set.add(selection.of(list, group)[i], 1);
  });
}

/// The same queries in tiles of at most `size`, for the dense pass.
QueryTiles cut(const std::vector<std::int32_t>& rows, int size) {
  QueryTiles tiles;
  tiles.rows = rows;
  for (int first = 0; first < static_cast<int>(rows.size()); first += size)
    tiles.offset.push_back(std::min(first + size, static_cast<int>(rows.size())));
  return tiles;
}

}  // namespace

AttentionRunner::AttentionRunner(Backend& backend, AttentionPlan plan, ScaleSchedule schedule, int layers)
    : backend_(backend),
      plan_(std::move(plan)),
      schedule_(std::move(schedule)),
      pairs_(schedule_.size()),
      seconds_(schedule_.size()),
      decisions_(layers) {
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
  return pairs_[scale] / static_cast<double>(decisions_.size());
}

void AttentionRunner::start(int scale) { pairs_[scale] = seconds_[scale] = 0; }

void AttentionRunner::run(int layer, int scale, AttentionArgs& args) {
  if (query_observer_) query_observer_(layer, scale, args);
  const auto start = std::chrono::steady_clock::now();
  const AttentionMethod& method = plan_.method(layer, scale);
  if (const auto* m = std::get_if<CslaAttention>(&method))
    pairs_[scale] += csla(*m, layer, args, scale);
  else if (const auto* m4 = std::get_if<Cs4aAttention>(&method))
    pairs_[scale] += cs4a(*m4, layer, args, scale);
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
    known.prepared = backend_.prepare_lists(known.tiles, known.lists);
  }
  show(layer, scale, known.tiles, known.lists);
  backend_.attention(args, *known.prepared);
  return known.share;
}

double AttentionRunner::cs4a(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale) {
  if (scale <= method.decision_scale) return decide(method, layer, args, scale);
  Decision* decision = decisions_[layer].get();
  if (decision == nullptr)
    throw Error(ErrorKind::usage,
                fmt::format("plan {}: layer {} carries keys at scale {}, but did not decide at scale {}", plan_.name,
                            layer, scale, method.decision_scale));
  decision->keep(args.q.dim(0), args.q.dim(1));
  const QueryTiles tiles = group_tiles(schedule_[scale], method.group);
  const KeyLists lists = carry_keys(method, schedule_, scale, tiles, decision->selection);
  show(layer, scale, tiles, lists);
  backend_.attention(args, tiles, lists);
  if (decision->cache.defined())
    backend_.add_resized(args.out, decision->cache, schedule_[method.decision_scale], schedule_[scale]);
  return sparvar::share_of_pairs(tiles, lists, keys_[scale]);
}

double AttentionRunner::decide(const Cs4aAttention& method, int layer, AttentionArgs& args, int scale) {
  if (scale < method.decision_scale) return dense(args, scale);
  const int heads = static_cast<int>(args.q.dim(0) * args.q.dim(1));
  args.statistics = Tensor::empty(DType::f32, {args.q.dim(0), args.q.dim(1), args.q.dim(2), 2});
  dense(args, scale);
  const QueryTiles groups = group_tiles(schedule_[scale], method.group);
  const Tensor sums = backend_.column_sums(args, groups, keys_[scale]);
  args.statistics = Tensor();
  auto decision = std::make_unique<Decision>();
  decision->selection = select_keys(sums.data<float>(), heads, groups.count(), keys_[scale],
                                    kept_keys(method.share, keys_[scale], method.granularity));
  double share = 1;
  if (method.residual) {
    AttentionArgs sparse = args;
    sparse.out = Tensor::empty(args.out.dtype(), args.out.shape());
    const KeyLists lists = lists_of(decision->selection, keys_[scale]);
    backend_.attention(sparse, groups, lists);
    decision->cache = backend_.subtract(args.out, sparse.out);
    share += sparvar::share_of_pairs(groups, lists, keys_[scale]);
  }
  decisions_[layer] = std::move(decision);
  return share;
}

double AttentionRunner::probe(const ProbeAttention& method, int layer, AttentionArgs& args, int scale) {
  const Grid grid = schedule_[scale];
  const ProbeLayout layout = probe_layout(grid, method);
  const int heads = static_cast<int>(args.q.dim(0) * args.q.dim(1));

  // The probes see all keys; their outputs land in their rows of out.
  const QueryTiles probes = cut(layout.probe_rows, kDenseTile);
  args.statistics = Tensor::empty(DType::f32, {args.q.dim(0), args.q.dim(1), args.q.dim(2), 2});
  backend_.attention(args, probes, all_keys(probes, keys_[scale]));
  Tensor dense_rows;
  if (method.residual) dense_rows = backend_.gather_rows(args.out, layout.probe_rows);
  QueryTiles choosers = layout.choosers;
  for (std::int32_t& row : choosers.rows) row = layout.probe_rows[row];
  const Tensor sums = backend_.column_sums(args, choosers, keys_[scale]);
  args.statistics = Tensor();

  const KeyLists lists = probe_lists(schedule_, scale, method, layout, sums.data<float>(), heads);
  show(layer, scale, layout.tiles, lists);
  backend_.attention(args, layout.tiles, lists);
  if (method.residual) {
    const Tensor residual = backend_.subtract(dense_rows, backend_.gather_rows(args.out, layout.probe_rows));
    backend_.add_resized(args.out, residual, layout.probe_grid, grid);
  }
  return sparvar::share_of_pairs(layout.tiles, lists, keys_[scale]) +
         static_cast<double>(layout.probe_rows.size()) / grid.tokens();
}

}  // namespace sparvar
