#include "pipeline/tune_space.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "attention/csla.h"
#include "attention/survey.h"

namespace sparvar {
namespace {

template <typename T>
T one_of(std::mt19937_64& random, const std::vector<T>& values) {
  return values[drawn(random, values.size())];
}

/// From the finest to the coarsest; lists get longer and fewer. The last one is the published form, in row order.
const std::vector<QueryGroup>& groups() {
  static const std::vector<QueryGroup> all = {{4, 4, 0}, {4, 8, 0}, {8, 8, 0}, {8, 16, 0}, {16, 16, 0}, {8, 8, 192}};
  return all;
}
const std::vector<double> kShares = {0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4};
const std::vector<int> kStrides = {2, 4, 8, 16, 32};
constexpr int kWidestWindow = 25;  // tokens
constexpr int kMostSinkScales = 8;
constexpr int kMostWindowScales = 5;
constexpr int kSteppedWindows = 5;  // of CSLA: key scales, the last ones

QueryGroup any_group(std::mt19937_64& random) {
  return groups()[1 + drawn(random, groups().size() - 2)];  // not the two extremes
}

CslaAttention any_csla(int scales, std::mt19937_64& random) {
  CslaAttention csla = published_csla(scales, CslaAttention::Form::lists);
  // w, 2 w + 1, 3 w + 2: about once, twice, three times; each scale draws its own.
  for (int& window : csla.windows)
    if (window > 0) window = one_of<int>(random, {1, 2, 3}) * (window + 1) - 1;
  csla.sink_scales = one_of<int>(random, {5, 7, 8});
  csla.centre = CslaAttention::Centre::half_pixel;
  csla.group = any_group(random);
  return csla;
}

Cs4aAttention any_cs4a(int first_scale, std::mt19937_64& random) {
  Cs4aAttention cs4a;
  cs4a.decision_scale = first_scale;
  cs4a.share = one_of<double>(random, {0.05, 0.1, 0.15, 0.2, 0.3});
  cs4a.granularity = 1;
  cs4a.group = any_group(random);
  cs4a.carry = one_of<Cs4aAttention::Carry>(
      random, {Cs4aAttention::Carry::group, Cs4aAttention::Carry::group, Cs4aAttention::Carry::grid});
  cs4a.own_windows = {one_of<int>(random, {0, 5, 7, 9}), one_of<int>(random, {0, 5, 7, 9, 11})};
  cs4a.residual = drawn(random, 5) != 0;
  return cs4a;
}

ProbeAttention any_probe(std::mt19937_64& random) {
  ProbeAttention probe;
  probe.stride = one_of<int>(random, {4, 8, 8, 16});
  probe.share = one_of<double>(random, {0.01, 0.02, 0.03, 0.05, 0.08, 0.12});
  probe.group = any_group(random);
  probe.window = one_of<int>(random, {3, 5, 7, 9, 11});
  probe.window_scales = one_of<int>(random, {1, 2, 3, 4});
  probe.sink_scales = one_of<int>(random, {0, 5, 7});
  probe.residual = drawn(random, 5) != 0;
  return probe;
}

LayerOption any_option(int scales, std::mt19937_64& random) {
  const int first = std::max(1, scales - one_of<int>(random, {4, 3, 3, 2}));
  LayerOption option{"", DenseAttention{}, first};
  const std::size_t kind = drawn(random, 6);
  if (kind == 0)
    option.method = any_csla(scales, random);
  else if (kind <= 2)
    option.method = any_cs4a(first, random);
  else
    option.method = any_probe(random);
  return option;
}

/// The values beside `value` in an ascending list: the largest below and the smallest above.
template <typename T>
std::vector<T> beside(const std::vector<T>& ladder, T value) {
  std::vector<T> out;
  const auto above = std::upper_bound(ladder.begin(), ladder.end(), value);
  auto below = std::lower_bound(ladder.begin(), ladder.end(), value);
  if (below != ladder.begin()) out.push_back(*--below);
  if (above != ladder.end()) out.push_back(*above);
  return out;
}

/// Narrower and wider by one token on each side; below 1 there is `none`.
std::vector<int> windows_beside(int window, int none) {
  std::vector<int> out;
  if (window > none) out.push_back(window <= 1 ? none : window - 2);
  if (window < kWidestWindow) out.push_back(window < 1 ? 1 : window + 2);
  return out;
}

std::vector<int> counts_beside(int count, int lowest, int highest) {
  std::vector<int> out;
  for (const int step : {-1, 1})
    if (count + step >= lowest && count + step <= highest) out.push_back(count + step);
  return out;
}

std::vector<QueryGroup> groups_beside(const QueryGroup& group) {
  const auto found = std::find(groups().begin(), groups().end(), group);
  if (found == groups().end()) return {{8, 8, 0}};
  std::vector<QueryGroup> out;
  if (found != groups().begin()) out.push_back(*(found - 1));
  if (found + 1 != groups().end()) out.push_back(*(found + 1));
  return out;
}

/// Copies of `method` with `member` set to each of `values`.
template <typename Method, typename T>
void step(std::vector<AttentionMethod>& out, const Method& method, T Method::*member, const std::vector<T>& values) {
  for (const T& value : values) {
    Method changed = method;
    changed.*member = value;
    out.emplace_back(std::move(changed));
  }
}
template <typename Method>
void step_list(std::vector<AttentionMethod>& out, const Method& method, std::vector<int> Method::*member,
               std::size_t at, const std::vector<int>& values) {
  for (const int value : values) {
    Method changed = method;
    (changed.*member)[at] = value;
    out.emplace_back(std::move(changed));
  }
}

std::vector<AttentionMethod> steps(const DenseAttention&) { return {}; }

std::vector<AttentionMethod> steps(const CslaAttention& m) {
  std::vector<AttentionMethod> out;
  const std::size_t count = m.windows.size();
  for (std::size_t j = count - std::min<std::size_t>(count, kSteppedWindows); j < count; ++j)
    step_list(out, m, &CslaAttention::windows, j, windows_beside(m.windows[j], -1));
  step(out, m, &CslaAttention::sink_scales, counts_beside(m.sink_scales, 0, kMostSinkScales));
  if (m.form == CslaAttention::Form::lists) step(out, m, &CslaAttention::group, groups_beside(m.group));
  return out;
}

std::vector<AttentionMethod> steps(const Cs4aAttention& m) {
  std::vector<AttentionMethod> out;
  step(out, m, &Cs4aAttention::share, beside(kShares, m.share));
  for (std::size_t j = 0; j < m.own_windows.size(); ++j)
    step_list(out, m, &Cs4aAttention::own_windows, j, windows_beside(m.own_windows[j], 0));
  step(out, m, &Cs4aAttention::group, groups_beside(m.group));
  using Carry = Cs4aAttention::Carry;
  step(out, m, &Cs4aAttention::carry, {m.carry == Carry::group ? Carry::grid : Carry::group});
  step(out, m, &Cs4aAttention::residual, {!m.residual});
  return out;
}

std::vector<AttentionMethod> steps(const ProbeAttention& m) {
  std::vector<AttentionMethod> out;
  step(out, m, &ProbeAttention::stride, beside(kStrides, m.stride));
  step(out, m, &ProbeAttention::share, beside(kShares, m.share));
  step(out, m, &ProbeAttention::window, windows_beside(m.window, 0));
  step(out, m, &ProbeAttention::window_scales, counts_beside(m.window_scales, 1, kMostWindowScales));
  step(out, m, &ProbeAttention::sink_scales, counts_beside(m.sink_scales, 0, kMostSinkScales));
  step(out, m, &ProbeAttention::group, groups_beside(m.group));
  step(out, m, &ProbeAttention::residual, {!m.residual});
  return out;
}

std::string shape_of(const QueryGroup& group) {
  return group.rows > 0 ? fmt::format("{} rows", group.rows) : fmt::format("{}x{}", group.tile_h, group.tile_w);
}

std::string words(const DenseAttention&) { return "dense"; }
std::string words(const CslaAttention& m) {
  std::vector<int> last(m.windows.end() - std::min<std::ptrdiff_t>(std::ssize(m.windows), kSteppedWindows),
                        m.windows.end());
  const bool blocks = m.form == CslaAttention::Form::blocks;
  return fmt::format("csla w{} sinks {} {}", fmt::join(last, ","), m.sink_scales,
                     blocks ? fmt::format("blocks of {}", m.block) : shape_of(m.group));
}
std::string words(const Cs4aAttention& m) {
  constexpr const char* kCarries[] = {"ratio", "group", "grid"};
  return fmt::format("cs4a {:g}% {} w{} by {}{}", 100 * m.share, shape_of(m.group), fmt::join(m.own_windows, ","),
                     kCarries[static_cast<int>(m.carry)], m.residual ? " residual" : "");
}
std::string words(const ProbeAttention& m) {
  return fmt::format("probe 1/{} {:g}% {} w{}x{} sinks {}{}", m.stride * m.stride, 100 * m.share, shape_of(m.group),
                     m.window, m.window_scales, m.sink_scales, m.residual ? " residual" : "");
}

}  // namespace

int first_tuned_scale(int scales) { return std::max(0, scales - 4); }

std::string described(const LayerOption& option) {
  const std::string method = std::visit([](const auto& m) { return words(m); }, option.method);
  const bool dense = std::holds_alternative<DenseAttention>(option.method);
  return dense ? method : fmt::format("{} from {}", method, option.first_scale);
}

std::vector<LayerOption> neighbours(const LayerOption& option, int scales) {
  std::vector<LayerOption> out;
  for (AttentionMethod& method : std::visit([](const auto& m) { return steps(m); }, option.method))
    out.push_back({"", std::move(method), option.first_scale});
  if (!std::holds_alternative<DenseAttention>(option.method))
    for (const int first :
         counts_beside(option.first_scale, std::max(1, first_tuned_scale(scales)), std::max(1, scales - 1))) {
      LayerOption moved{"", option.method, first};
      if (auto* cs4a = std::get_if<Cs4aAttention>(&moved.method)) cs4a->decision_scale = first;
      out.push_back(std::move(moved));
    }
  for (LayerOption& one : out) one.name = described(one);
  return out;
}

std::vector<LayerRun> runs_of(const Assignment& layers) {
  std::vector<LayerRun> runs;
  for (int i = 0; i < static_cast<int>(layers.size()); ++i) {
    const int option = layers[static_cast<std::size_t>(i)];
    if (runs.empty() || runs.back().option != option) runs.push_back({i, i, option});
    runs.back().end = i + 1;
  }
  return runs;
}

std::string name_of(const std::vector<LayerOption>& options, const Assignment& layers) {
  const std::vector<LayerRun> runs = runs_of(layers);
  const auto name = [&](const LayerRun& run) { return options[static_cast<std::size_t>(run.option)].name; };
  if (runs.size() == 1) return name(runs.front());
  std::vector<std::string> parts;
  for (const LayerRun& run : runs)
    parts.push_back(run.end - run.first == 1 ? fmt::format("layer {}: {}", run.first, name(run))
                                             : fmt::format("layers {}-{}: {}", run.first, run.end - 1, name(run)));
  return fmt::format("{}", fmt::join(parts, "; "));
}

AttentionPlan plan_of(const std::string& name, const std::vector<LayerOption>& options, const Assignment& layers) {
  AttentionPlan plan{name, {}};
  const int count = static_cast<int>(layers.size());
  for (const LayerRun& run : runs_of(layers)) {
    const LayerOption& what = options[static_cast<std::size_t>(run.option)];
    if (!std::holds_alternative<DenseAttention>(what.method))
      plan.rules.push_back({run.first, run.end == count ? -1 : run.end - 1, what.first_scale, -1, what.method});
  }
  return plan;
}

Assignment split_at(int layers, int bound, int below, int above) {
  Assignment out(static_cast<std::size_t>(layers), above);
  std::fill_n(out.begin(), std::min(bound + 1, layers), below);
  return out;
}

std::vector<LayerOption> option_pool(int layers, int scales, int count, std::mt19937_64& random) {
  std::vector<LayerOption> options;
  const auto add = [&](const LayerOption& option) {
    if (static_cast<int>(options.size()) < count && std::find(options.begin(), options.end(), option) == options.end())
      options.push_back(option);
  };
  for (const std::string& name : AttentionPlan::preset_names())
    for (const AttentionRule& rule : AttentionPlan::preset(name, layers, scales).rules)
      add({name, rule.method, rule.first_scale});
  for (int tries = 0; static_cast<int>(options.size()) < count && tries < 100 * count; ++tries) {
    LayerOption option = any_option(scales, random);
    option.name = described(option);
    add(option);
  }
  return options;
}

}  // namespace sparvar
