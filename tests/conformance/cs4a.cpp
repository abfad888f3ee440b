// CS4A from the column sums to the carried lists and outputs, operation by operation on a device: each is given what
// the fixture says of the one before, so that a bound for bf16 can be derived. In f32 the runner's own way through as
// well.
#include "attention/cs4a.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "attention/csla.h"
#include "backend/backend.h"
#include "conformance/attention_bound.h"
#include "conformance/report.h"
#include "models/attention_runner.h"

namespace sparvar::conformance {
namespace {

constexpr double kOut = 5e-6, kSums = 5e-5;  // f32 against f64: outputs, column sums

/// [B, H, n, D] of the fixture -> [B, n, H, D] as a device writes it.
Tensor rows_first(const Tensor& x) {
  const std::int64_t b = x.dim(0), heads = x.dim(1), n = x.dim(2), d = x.dim(3);
  Tensor out = Tensor::empty(DType::f32, {b, n, heads, d});
  for (std::int64_t row = 0; row < b * heads * n; ++row) {
    const std::int64_t batch = row / (heads * n), head = row / n % heads, i = row % n;
    std::copy_n(x.data<float>() + row * d, d, out.data<float>() + ((batch * n + i) * heads + head) * d);
  }
  return out;
}

std::set<std::int64_t> row_of(const Tensor& x, std::int64_t row, std::int64_t length) {
  std::set<std::int64_t> out;
  for (std::int64_t i = 0; i < length; ++i) out.insert(integer(x, row * length + i));
  return out;
}

/// Lists that hold other keys than the fixture's indices [B, H, groups, L].
void compare_lists(const KeyLists& lists, const Tensor& expected, const std::string& name, Report& report) {
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < lists.lists * static_cast<std::int64_t>(lists.tiles); ++i) {
    std::set<std::int64_t> found;
    for (std::int64_t r = lists.offset[i]; r < lists.offset[i + 1]; ++r)
      for (int key = 0; key < lists.runs[r].count; ++key) found.insert(lists.runs[r].begin + key);
    wrong += row_of(expected, i, expected.dim(3)) != found ? 1 : 0;
  }
  report.count(name, wrong, static_cast<std::int64_t>(lists.lists) * lists.tiles);
}

KeyLists lists_from(const Tensor& indices, int keys) {
  const std::int64_t length = indices.dim(3);
  return build_lists(static_cast<int>(indices.dim(0) * indices.dim(1)), static_cast<int>(indices.dim(2)), keys,
                     [&](int list, int tile, KeySet& set) {
                       for (const std::int64_t key : row_of(indices, list * indices.dim(2) + tile, length))
                         set.add(static_cast<int>(key), 1);
                     });
}

void compare_group_maps(const TensorFile& io, const Cs4aAttention& method, const ScaleSchedule& schedule, int k,
                        Report& report) {
  const QueryTiles tiles = group_tiles(schedule[k], method.group);
  const int groups_s = group_tiles(schedule[method.decision_scale], method.group).count();
  if (const std::string name = fmt::format("group_of_S.s{}", k); io.has(name)) {
    std::int64_t wrong = 0;
    for (int g = 0; g < tiles.count(); ++g)
      wrong += integer(io.get(name), g) != group_of_decision(g, tiles.count(), groups_s) ? 1 : 0;
    report.count(name, wrong, tiles.count());
  }
  if (const std::string name = fmt::format("local_run.s{}", k); io.has(name)) {
    const Tensor& expected = io.get(name);
    const auto runs = local_runs(schedule[k], first_keys(schedule, k)[k],
                                 method.own_windows[k - method.decision_scale - 1], tiles, method.granularity);
    std::int64_t wrong = 0;
    for (int g = 0; g < tiles.count(); ++g)
      wrong += integer(expected, g * expected.dim(1)) != runs[g].begin || expected.dim(1) != runs[g].count ? 1 : 0;
    report.count(name, wrong, tiles.count());
  }
}

/// One fixture on one device.
class Cs4aRun {
 public:
  Cs4aRun(const TensorFile& io, ScaleSchedule schedule, Cs4aAttention method, Backend& device, Report& report)
      : io_(io), schedule_(std::move(schedule)), method_(std::move(method)), device_(device), report_(report) {}

  void decide();
  /// Carries in one form: lists, outputs with the residual, pairs of query and key.
  void carry(const std::string& form, const Cs4aAttention& method);
  /// The same through the runner, which takes the keys that the device chose itself.
  void run(const std::string& form, const Cs4aAttention& method);
  void duplicates(int k);

 private:
  /// An output and how far it may lie from the fixture's.
  struct Judged {
    Tensor value;   // [B, n, H, D] of the device
    Tensor bounds;  // f32, on the host
  };

  bool f32() const { return device_.compute_type() == DType::f32; }
  int keys(int k) const { return first_keys(schedule_, k).back(); }
  QueryTiles groups(int k) const { return group_tiles(schedule_[k], method_.group); }
  AttentionArgs host_args(int k) const {
    return {.q = io_.get(fmt::format("q.s{}", k)).to(DType::f32),
            .k = io_.get("k_all").to(DType::f32),
            .v = io_.get("v_all").to(DType::f32),
            .out = {},
            .scale = 1.0F,
            .statistics = {}};
  }
  AttentionArgs device_args(int k) const;
  Tensor bounds_of(int k, const KeyLists& lists) const;
  Judged dense() const;
  Judged sparse(int k, const ListRecipe& recipe, const Tensor& choice, const std::string& name) const;
  Judged residual(const Judged& dense, const Judged& sparse, const Tensor& expected) const;
  void add_residual(Judged& out, const Judged& cache, int k) const;
  void judge(const std::string& name, const Judged& found, const Tensor& expected) const;
  Tensor selected(const Tensor& sums, const Cs4aAttention& method) const {
    const std::vector<int> counts = counts_to_choose(method, schedule_);
    Tensor choice = device_.empty(DType::i32, {sums.dim(0), sums.dim(1), std::int64_t{counts.front()}});
    device_.select_keys(sums, counts, choice);
    return choice;
  }
  Tensor choice(const Cs4aAttention& method) const {
    const Tensor& sums = io_.get("colsum");  // [B, H, groups, keys]
    return selected(device_.upload(sums).reshaped({sums.dim(0) * sums.dim(1), sums.dim(2), sums.dim(3)}), method);
  }
  void compare_selected(const std::string& name, const Tensor& choice) const;

  const TensorFile& io_;
  ScaleSchedule schedule_;
  Cs4aAttention method_;
  Backend& device_;
  Report& report_;
};

AttentionArgs Cs4aRun::device_args(int k) const {
  AttentionArgs args = host_args(k);
  const Shape shape = args.q.shape();
  for (Tensor* x : {&args.q, &args.k, &args.v}) *x = device_.upload(x->to(device_.compute_type()));
  args.out = device_.zeros(device_.compute_type(), {shape[0], shape[2], shape[1], shape[3]});
  return args;
}

/// In f32 the fixture's tolerance, in bf16 what follows from rounding.
Tensor Cs4aRun::bounds_of(int k, const KeyLists& lists) const {
  const AttentionArgs args = host_args(k);
  Tensor out = f32() ? Tensor::zeros(DType::f32, {args.q.dim(0), args.q.dim(2), args.q.dim(1), args.q.dim(3)})
                     : bf16_bounds(args, groups(k), lists).out;
  for (std::int64_t i = 0; i < out.size(); ++i) out.data<float>()[i] += static_cast<float>(kOut);
  return out;
}

void Cs4aRun::judge(const std::string& name, const Judged& found, const Tensor& expected) const {
  report_.within(name, device_.download(found.value), rows_first(expected),
                 {found.bounds.data<float>(), found.bounds.data<float>() + found.bounds.size()});
}

Cs4aRun::Judged Cs4aRun::dense() const {
  const int s = method_.decision_scale;
  AttentionArgs args = device_args(s);
  device_.dense_attention(args, keys(s));
  return {args.out, bounds_of(s, all_keys(groups(s), keys(s)))};
}

void Cs4aRun::compare_selected(const std::string& name, const Tensor& choice) const {
  const Tensor& selected = io_.get("selected");
  const Tensor found = device_.download(choice);
  const std::int64_t length = selected.dim(3), rows = selected.size() / length;
  std::int64_t wrong = found.size() == selected.size() ? 0 : rows;
  for (std::int64_t i = 0; wrong < rows && i < rows; ++i)
    wrong += row_of(selected, i, length) != row_of(found, i, length) ? 1 : 0;
  report_.count(name, wrong, rows);
}

void Cs4aRun::decide() {
  const int s = method_.decision_scale;
  const QueryTiles tiles = groups(s);
  judge(fmt::format("o_dense.s{}", s), dense(), io_.get(fmt::format("o_dense.s{}", s)));
  AttentionArgs args = device_args(s);
  args.statistics = device_.zeros(DType::f32, {args.q.dim(0), args.q.dim(1), args.q.dim(2), 2});
  device_.dense_attention(args, keys(s));
  const Tensor sums = device_.column_sums(args, tiles, keys(s));
  std::vector<float> bounds(static_cast<std::size_t>(io_.get("colsum").size()), static_cast<float>(kSums));
  if (!f32()) {
    const Tensor more = bf16_bounds(host_args(s), tiles, all_keys(tiles, keys(s))).sums;  // of all keys there are
    const std::int64_t stride = more.dim(2);
    for (std::size_t i = 0; i < bounds.size(); ++i)
      bounds[i] +=
          more.data<float>()[static_cast<std::int64_t>(i) / keys(s) * stride + static_cast<std::int64_t>(i) % keys(s)];
  }
  report_.within("colsum", device_.download(sums), io_.get("colsum"), bounds);
  compare_selected("selected", choice(method_));
  if (f32()) compare_selected("selected by own sums", selected(sums, method_));
}

/// Attention to the lists that the device makes of the choice; the pairs it counts are those of the lists.
Cs4aRun::Judged Cs4aRun::sparse(int k, const ListRecipe& recipe, const Tensor& choice, const std::string& name) const {
  AttentionArgs args = device_args(k);
  Tensor pairs = device_.zeros(DType::i64, {1});
  const AttentionRecipePtr prepared = device_.prepare_recipe(recipe);
  device_.attention(args, *prepared, choice, pairs);
  const KeyLists lists = follow(recipe, device_.download(choice));
  std::int64_t expected = 0;
  for (int list = 0; list < lists.lists; ++list)
    for (int t = 0; t < lists.tiles; ++t) expected += lists.keys_in(list, t) * recipe.tiles.rows_in(t);
  const std::int64_t counted = device_.download(pairs).data<std::int64_t>()[0];
  report_.check(name + " pairs", fmt::format("{}, expected {}", counted, expected), counted == expected);
  return {args.out, bounds_of(k, lists)};
}

/// `expected` [B, n, H, D]: the fixture's, which the rounding of the difference is a share of.
Cs4aRun::Judged Cs4aRun::residual(const Judged& dense, const Judged& sparse, const Tensor& expected) const {
  Judged out{device_.empty(device_.product_type(), dense.value.shape()), Tensor::empty(DType::f32, expected.shape())};
  device_.subtract(dense.value, sparse.value, out.value);
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    const double moved = static_cast<double>(dense.bounds.data<float>()[i]) + sparse.bounds.data<float>()[i];
    const double rounding = f32() ? 0 : kBf16Rounding * (std::abs(expected.data<float>()[i]) + moved);
    out.bounds.data<float>()[i] = static_cast<float>(moved + rounding);
  }
  return out;
}

/// The resize is a weighted mean: bounds pass through it as values do. The sum is rounded once more.
void Cs4aRun::add_residual(Judged& out, const Judged& cache, int k) const {
  const Grid from = schedule_[method_.decision_scale], to = schedule_[k];
  device_.add_resized(out.value, cache.value, from, to);
  make_cpu_backend({.compute = DType::f32, .threads = 1})->add_resized(out.bounds, cache.bounds, from, to);
  if (f32()) return;
  const Tensor value = device_.download(out.value).to(DType::f32);
  for (std::int64_t i = 0; i < value.size(); ++i)
    out.bounds.data<float>()[i] += static_cast<float>(kBf16Rounding * 2 * std::abs(value.data<float>()[i]));
}

void Cs4aRun::carry(const std::string& form, const Cs4aAttention& method) {
  const int s = method.decision_scale;
  const Tensor chosen = choice(method);
  const QueryTiles tiles = groups(s);
  ListRecipe own{.tiles = tiles,
                 .keys = keys(s),
                 .chosen = static_cast<int>(chosen.dim(2)),
                 .group_of = std::vector<std::int32_t>(tiles.count()),
                 .map = {},
                 .fixed = {}};
  std::iota(own.group_of.begin(), own.group_of.end(), 0);
  const Judged cache =
      residual(dense(), sparse(s, own, chosen, fmt::format("{}.s{}", form, s)), rows_first(io_.get("o_cache")));
  judge(form + ".o_cache", cache, io_.get("o_cache"));
  for (int k = s + 1; k < static_cast<int>(schedule_.size()); ++k) {
    const std::string indices = fmt::format("{}.indices.s{}", form, k), out = fmt::format("{}.out.s{}", form, k);
    const ListRecipe recipe = carry_recipe(method, schedule_, k, groups(k), tiles.count(), own.chosen);
    if (io_.has(indices)) compare_lists(follow(recipe, device_.download(chosen)), io_.get(indices), indices, report_);
    Judged found = sparse(k, recipe, chosen, fmt::format("{}.s{}", form, k));
    add_residual(found, cache, k);
    if (io_.has(out)) judge(out, found, io_.get(out));
  }
}

void Cs4aRun::run(const std::string& form, const Cs4aAttention& method) {
  AttentionRunner runner(device_, {form, {{0, -1, method.decision_scale, -1, method}}}, schedule_, 1);
  for (int k = method.decision_scale; k < static_cast<int>(schedule_.size()); ++k) {
    AttentionArgs args = device_args(k);
    runner.start(k);
    runner.run(0, k, args);
    if (const std::string out = fmt::format("{}.out.s{}", form, k); io_.has(out))
      report_.compare("runner." + out, device_.download(args.out), rows_first(io_.get(out)), kOut);
  }
}

void Cs4aRun::duplicates(int k) {
  const std::string name = fmt::format("dup.indices.s{}", k);
  if (!io_.has(name)) return;
  const KeyLists lists = lists_from(io_.get(name), keys(k));
  AttentionArgs args = device_args(k);
  device_.attention(args, groups(k), lists);
  judge(fmt::format("dup.out.s{}", k), {args.out, bounds_of(k, lists)}, io_.get(fmt::format("dup.out.s{}", k)));
}

}  // namespace

void run_cs4a(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  const ScaleSchedule schedule = read_schedule(config.at("scale_schedule"));
  const std::unique_ptr<Backend> device = settings.backend(settings.compute());
  const int s = config.at("decision_scale");
  const int last = static_cast<int>(schedule.size()) - 1;
  Cs4aAttention method;
  method.decision_scale = s;
  method.share = config.at("top_keys");
  method.granularity = config.at("multiple_of");
  method.group = {1, 1, config.at("group").get<int>()};
  method.own_windows.clear();
  for (int k = s + 1; k <= last; ++k)
    method.own_windows.push_back(config.at("local_windows").value(std::to_string(k), 0));

  Cs4aRun run(io, schedule, method, *device, report);
  run.decide();
  for (int k = s + 1; k <= last; ++k) compare_group_maps(io, method, schedule, k, report);
  const std::pair<const char*, Cs4aAttention::Carry> forms[] = {{"group", Cs4aAttention::Carry::group},
                                                                {"ratio", Cs4aAttention::Carry::ratio},
                                                                {"grid", Cs4aAttention::Carry::grid}};
  for (const auto& [form, carry] : forms) {
    Cs4aAttention carried = method;
    carried.carry = carry;
    if (carry != Cs4aAttention::Carry::group) carried.own_windows.clear();
    run.carry(form, carried);
    if (settings.compute() == DType::f32) run.run(form, carried);
  }
  for (int k = s + 1; k <= last; ++k) run.duplicates(k);
}

}  // namespace sparvar::conformance
