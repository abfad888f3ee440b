#include "pipeline/measure_attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "models/attention_runner.h"
#include "pipeline/measure.h"
#include "pipeline/median.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

AttentionArgs random_args(Backend& backend, const AttentionCase& of, int queries, int keys) {
  const DType type = backend.compute_type();
  const std::int64_t b = of.batch, h = of.heads, d = of.dim;
  return {.q = backend.random(type, {b, h, queries, d}, 1, 1.0F),
          .k = backend.random(type, {b, h, keys, d}, 2, 0.1F),
          .v = backend.random(type, {b, h, keys, d}, 3, 1.0F),
          .out = backend.empty(type, {b, queries, h, d}),
          .scale = 1.0F,
          .statistics = {}};
}

/// Head `at` of x [B, H, n, D] on the host: f32 [n, D].
Tensor head_of(Backend& backend, const Tensor& x, std::int64_t at) {
  const Tensor heads = x.reshaped({x.dim(0) * x.dim(1), x.dim(2), x.dim(3)});
  return backend.download(heads.rows(at, at + 1)).to(DType::f32);
}

/// Attention of one query [D] to its keys, in double precision.
std::vector<double> exact_row(const float* q, const Tensor& k, const Tensor& v, float scale,
                              const std::vector<int>& keys) {
  const std::int64_t dim = k.dim(2);
  std::vector<double> weights, out(static_cast<std::size_t>(dim));
  double largest = -INFINITY, sum = 0;
  for (const int key : keys) {
    double logit = 0;
    for (std::int64_t d = 0; d < dim; ++d) logit += static_cast<double>(q[d]) * k.data<float>()[key * dim + d];
    weights.push_back(logit * scale);
    largest = std::max(largest, weights.back());
  }
  for (double& weight : weights) sum += weight = std::exp(weight - largest);
  for (std::size_t i = 0; i < keys.size(); ++i)
    for (std::int64_t d = 0; d < dim; ++d) out[d] += weights[i] / sum * v.data<float>()[keys[i] * dim + d];
  return out;
}

/// Tiles of queries and what they read.
struct Lists {
  QueryTiles tiles;
  KeyLists lists;

  std::vector<int> of(std::int64_t head, int tile) const {
    std::vector<int> keys;
    const std::int64_t at = (lists.lists == 1 ? 0 : head) * lists.tiles + tile;
    for (std::int64_t r = lists.offset[at]; r < lists.offset[at + 1]; ++r)
      for (int i = 0; i < lists.runs[r].count; ++i) keys.push_back(lists.runs[r].begin + i);
    return keys;
  }
};

constexpr int kSampledHeads = 4, kSampledTiles = 8;  // a query of each tile

double relative_error(Backend& backend, const AttentionArgs& args, const Lists& lists) {
  const std::int64_t heads = args.q.dim(1), all = args.q.dim(0) * heads, dim = args.q.dim(3);
  double wrong = 0, size = 0;
  for (std::int64_t sample = 0; sample < std::min<std::int64_t>(kSampledHeads, all); ++sample) {
    const std::int64_t at = sample * all / std::min<std::int64_t>(kSampledHeads, all);
    const Tensor q = head_of(backend, args.q, at), k = head_of(backend, args.k, at), v = head_of(backend, args.v, at);
    const Tensor out = backend.download(args.out.rows(at / heads, at / heads + 1)).to(DType::f32);
    const int tiles = lists.tiles.count();
    for (int i = 0; i < std::min(kSampledTiles, tiles); ++i) {
      const int tile = i * tiles / std::min(kSampledTiles, tiles);
      const int query = lists.tiles.rows[lists.tiles.offset[tile] + lists.tiles.rows_in(tile) / 2];
      const std::vector<double> exact = exact_row(q.data<float>() + query * dim, k, v, args.scale, lists.of(at, tile));
      for (std::int64_t d = 0; d < dim; ++d) {
        const double found = out.data<float>()[(query * heads + at % heads) * dim + d];
        wrong += (found - exact[d]) * (found - exact[d]);
        size += exact[d] * exact[d];
      }
    }
  }
  return std::sqrt(wrong / size);
}

AttentionTime::Kernel measure_kernel(Backend& backend, AttentionArgs args, const Lists& of, bool dense, int keys,
                                     int repeat) {
  args.out = backend.zeros(args.out.dtype(), args.out.shape());
  const AttentionListsPtr lists = dense ? nullptr : backend.prepare_lists(of.tiles, of.lists);
  AttentionTime::Kernel kernel;
  kernel.seconds = warm_seconds(
      backend, [&] { dense ? backend.dense_attention(args, keys) : backend.attention(args, *lists); }, repeat);
  kernel.keys = share_of_pairs(of.tiles, of.lists, keys) * keys;
  kernel.flops = 4.0 * static_cast<double>(args.q.size()) * kernel.keys;
  kernel.error = relative_error(backend, args, of);
  return kernel;
}

double floor_of(double flops, double bytes, const Ceilings& ceilings) {
  return std::max(flops / ceilings.flops, bytes / ceilings.bytes);
}

}  // namespace

double AttentionTime::floor(const Ceilings& ceilings) const { return floor_of(flops, bytes, ceilings); }
double AttentionTime::kernel_floor(const Ceilings& ceilings) const {
  return kernel ? floor_of(kernel->flops, bytes, ceilings) : 0;
}

Ceilings measure_ceilings(Backend& backend) {
  Ceilings out;
  out.flops = product_rate(backend);
  const Tensor x = backend.zeros(DType::f32, {backend.records() ? 1LL << 28 : 1LL << 25});  // 1 GiB, 128 MiB
  out.bytes = 2.0 * static_cast<double>(x.bytes()) /
              warm_seconds(
                  backend, [&] { (void)backend.clone(x); }, 5);
  return out;
}

double warm_seconds(Backend& backend, const std::function<void()>& call, int repeat) {
  const auto sample = [&](int calls) {
    const MarkPtr start = backend.mark();
    for (int i = 0; i < calls; ++i) call();
    return backend.mark()->seconds_since(*start) / calls;
  };
  (void)sample(1);
  constexpr double kSample = 5e-3, kWarmUp = 20e-3;  // a GPU that stood idle takes a while to raise its clock
  const int calls = backend.records() ? std::clamp(static_cast<int>(kSample / sample(2)), 1, 50) : 1;
  for (double warm = 0; backend.records() && warm < kWarmUp;) warm += calls * sample(calls);
  std::vector<double> seconds;
  seconds.reserve(repeat);
  for (int r = 0; r < repeat; ++r) seconds.push_back(sample(calls));
  return median(std::move(seconds));
}

AttentionTime measure_attention(Backend& backend, const AttentionCase& of, int repeat) {
  if (of.plan.pruning)
    throw Error(ErrorKind::usage, fmt::format("plan {} prunes tokens, which saves more than attention; measure whole "
                                              "pictures: bench model",
                                              of.plan.name));
  std::vector<int> keys;
  for (int k = 0, sum = 0; k <= of.scale; ++k) keys.push_back(sum += of.schedule[k].tokens());
  AttentionTime time;
  time.queries = of.schedule[of.scale].tokens();
  time.keys = keys.back();
  AttentionRunner runner(backend, of.plan, of.schedule, 1, of.order);
  const AttentionMethod& method = of.plan.method(0, of.scale);
  const auto* cs4a = std::get_if<Cs4aAttention>(&method);
  if (cs4a != nullptr && cs4a->decision_scale < of.scale) {
    const int decision = cs4a->decision_scale;
    AttentionArgs args = random_args(backend, of, of.schedule[decision].tokens(), keys[decision]);
    runner.run(0, decision, args);
  }
  AttentionArgs args = random_args(backend, of, time.queries, time.keys);
  const auto call = [&] {
    runner.start(of.scale);
    runner.run(0, of.scale, args);
  };
  time.seconds = warm_seconds(backend, call, repeat);
  time.share = runner.share_of_pairs(of.scale);
  time.flops = 4.0 * static_cast<double>(args.q.size()) * time.share * time.keys;
  time.bytes = static_cast<double>(args.q.bytes() + args.k.bytes() + args.v.bytes() + args.out.bytes());

  std::optional<Lists> lists;
  runner.observe([&](int, int, const QueryTiles& tiles, const KeyLists& read) { lists = Lists{tiles, read}; });
  call();
  const bool decides = cs4a != nullptr && cs4a->decision_scale == of.scale;
  const bool dense = !lists && !decides;
  if (dense) {
    const QueryTiles tiles = row_tiles(time.queries, 64);
    lists = Lists{tiles, all_keys(tiles, time.keys)};
  }
  if (lists && !decides) {
    const KeyPlaces places(of.schedule, of.order);
    const Lists placed{places.tiles(of.scale, lists->tiles), places.lists(lists->lists)};
    time.kernel = measure_kernel(backend, args, placed, dense, time.keys, repeat);
  }
  return time;
}

}  // namespace sparvar
