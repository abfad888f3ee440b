#include "pipeline/tune_space.h"

#include <fmt/format.h>

#include <algorithm>

#include "attention/csla.h"
#include "attention/survey.h"

namespace sparvar {
namespace {

template <typename T>
T one_of(std::mt19937_64& random, const std::vector<T>& values) {
  return values[drawn(random, values.size())];
}

QueryGroup any_group(std::mt19937_64& random) {
  return one_of<QueryGroup>(random, {{8, 8, 0}, {8, 16, 0}, {16, 16, 0}, {4, 8, 0}});
}

CslaAttention any_csla(int scales, std::mt19937_64& random) {
  CslaAttention csla = published_csla(scales, CslaAttention::Form::lists);
  const int widening = one_of<int>(random, {1, 2, 3});
  for (int& window : csla.windows)
    if (window > 0) window = widening * (window + 1) - 1;  // w, 2 w + 1, 3 w + 2: about once, twice, three times
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
  const int window = one_of<int>(random, {0, 5, 7, 9});
  cs4a.own_windows = {window, window};
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

}  // namespace

AttentionPlan plan_of(const std::string& name, const std::vector<LayerOption>& options, const Assignment& layers) {
  AttentionPlan plan{name, {}};
  const int count = static_cast<int>(layers.size());
  for (int first = 0; first < count;) {
    const int option = layers[static_cast<std::size_t>(first)];
    int end = first + 1;
    while (end < count && layers[static_cast<std::size_t>(end)] == option) ++end;
    const LayerOption& what = options[static_cast<std::size_t>(option)];
    if (!std::holds_alternative<DenseAttention>(what.method))
      plan.rules.push_back({first, end == count ? -1 : end - 1, what.first_scale, -1, what.method});
    first = end;
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
    option.name = fmt::format("{}-{}", name_of(option.method), options.size());
    add(option);
  }
  return options;
}

}  // namespace sparvar
