#include "conformance/forced.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "sparvar/error.h"

namespace sparvar::conformance {
namespace {

constexpr double kMargin = 1e-3;      // f32: nearer ones may fall either way
constexpr double kTie = 1e-3;         // of two sums of weights, as a share: logits that differ by the margin
constexpr double kEqualShare = 0.99;  // bf16

Sampling draws() {
  Sampling sampling;
  sampling.seed = kForcedSeed;
  return sampling;
}

AttentionPlan plan_of(const std::string& name, int layers, int scales) {
  return name.ends_with(".json") ? AttentionPlan::from_file(name) : AttentionPlan::preset(name, layers, scales);
}

/// A bit is 1 where its second logit exceeds the first by more than this (src/bits/sampling.h).
double turning_point(const Sampling& sampling, std::int64_t picture, int scale, std::int64_t token, std::int64_t bit) {
  const double u = uniform_draw(sampling.seed, static_cast<std::uint64_t>(picture), scale, static_cast<int>(token),
                                static_cast<int>(bit));
  const double rarest = SamplingWords(sampling, 0).rarest;
  const double cut =
      rarest > 0 ? std::log((1 - rarest) / rarest) : std::numeric_limits<double>::infinity();  // of the sure bits
  return std::clamp(std::log(u / (1 - u)), -cut, cut);
}

struct Differences {
  std::int64_t differing = 0;
  std::int64_t total = 0;
  double margin = 0;  // the largest of a bit that differs

  void add(const Differences& more) {
    differing += more.differing;
    total += more.total;
    margin = std::max(margin, more.margin);
  }
};

/// `turns`: where bit (picture, token, bit) turns.
template <typename Turns>
Differences differences(const ForcedScale& a, const ForcedScale& b, Tensor ForcedScale::*drawn, Turns turns) {
  const Tensor& x = a.*drawn;
  const Tensor& y = b.*drawn;
  const std::int64_t tokens = x.dim(1), bits = x.dim(2);
  const auto distance = [](const ForcedScale& of, std::int64_t i, double turn) {
    const float* pair = of.logits.data<float>() + 2 * i;
    return std::abs(static_cast<double>(pair[1]) - pair[0] - turn);
  };
  Differences out{.total = x.size()};
  for (std::int64_t i = 0; i < x.size(); ++i) {
    if (x.data<std::uint8_t>()[i] == y.data<std::uint8_t>()[i]) continue;
    const double turn = turns(i / (tokens * bits), i / bits % tokens, i % bits);
    const double margin = std::max(distance(a, i, turn), distance(b, i, turn));
    ++out.differing;
    out.margin = std::isnan(margin) ? INFINITY : std::max(out.margin, margin);
  }
  return out;
}

ForcedChoice chosen(Backend& backend, const Choosing& of, const Tensor& choice, bool sums) {
  ForcedChoice out{.keys = backend.download(choice), .sums = {}, .counts = of.counts};
  if (!sums) return out;
  AttentionArgs some = of.args;
  if (!of.rows.empty()) some.q = backend.gather_queries(of.args.q, of.rows);
  out.sums = backend.download(backend.column_sums(some, of.groups, of.keys));
  return out;
}

/// How the choices of one group differ.
struct Swaps {
  std::int64_t keys = 0;  // that only one side chose
  std::int64_t total = 0;
  double gap = 0;  // the largest step down from a sum that was passed over to one that was taken, as a share
};

/// The first `count` keys of one group of both; `sums`: of one side.
void add_swaps(const std::int32_t* a, const std::int32_t* b, int count, const float* sums, Swaps& swaps) {
  std::vector<std::int32_t> x(a, a + count), y(b, b + count), only_x, only_y;
  std::sort(x.begin(), x.end());
  std::sort(y.begin(), y.end());
  std::set_difference(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(only_x));
  std::set_difference(y.begin(), y.end(), x.begin(), x.end(), std::back_inserter(only_y));
  swaps.total += count;
  swaps.keys += static_cast<std::int64_t>(only_x.size());
  for (const std::int32_t i : only_x)
    for (const std::int32_t j : only_y) {
      const double low = std::min(sums[i], sums[j]), high = std::max(sums[i], sums[j]);
      const double gap = high > 0 ? (high - low) / high : 0;
      swaps.gap = std::isnan(gap) ? INFINITY : std::max(swaps.gap, gap);
    }
  if (only_x.size() != only_y.size()) swaps.gap = INFINITY;  // a key twice
}

std::string text_of(const Differences& d) {
  return d.differing == 0
             ? fmt::format("0 of {} differ", d.total)
             : fmt::format("{} of {} differ, with margins of at most {:.1e}", d.differing, d.total, d.margin);
}

/// Keys that only one side chose: their sums must all but equal those they were preferred to.
void compare_choices(const std::vector<ForcedChoice>& found, const std::vector<ForcedChoice>& reference,
                     Report& report) {
  if (found.size() != reference.size())
    return report.check("choices of keys", fmt::format("{} and {}", found.size(), reference.size()), false);
  Swaps swaps;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const Tensor& x = found[i].keys;
    const Tensor& y = reference[i].keys;
    const std::int64_t groups = x.dim(0) * x.dim(1), chosen = x.dim(2), keys = reference[i].sums.dim(2);
    for (std::int64_t g = 0; g < groups; ++g)
      for (const int count : reference[i].counts)
        add_swaps(x.data<std::int32_t>() + g * chosen, y.data<std::int32_t>() + g * chosen, count,
                  reference[i].sums.data<float>() + g * keys, swaps);
  }
  if (swaps.total == 0) return;
  report.check("choices of keys",
               fmt::format("{} of {} differ, by weights {:.1e} apart at most", swaps.keys, swaps.total, swaps.gap),
               swaps.gap <= kTie);
}

}  // namespace

ForcedRun run_forced(Infinity& model, Backend& backend, const PackedText& text, WalkOptions options,
                     const Settings& settings, const ForcedRun* follow) {
  const auto all = static_cast<int>(options.schedule.size());
  options.plan = plan_of(settings.attention, model.config().depth, all);
  options.order = settings.order;
  if (settings.scales > 0 && settings.scales < all) {
    options.full = options.schedule.back();
    options.schedule.resize(settings.scales);
  }
  ForcedRun out;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (!name.starts_with("logits_cfg.")) return;
    const auto scale = static_cast<int>(out.scales.size());
    const auto draw = [&](const Sampling& sampling) {
      const Tensor words = backend.upload(SamplingWords(sampling, 0).to_tensor());
      return backend.download(backend.sample_bits(backend.upload(value), words, scale));
    };
    Sampling greedy;
    greedy.greedy = true;
    out.scales.push_back({.logits = value, .greedy = draw(greedy), .sampled = draw(draws())});
  };
  if (settings.shares_choices())
    options.on_choice = [&](int, int, const Choosing& of, Tensor& choice) {
      out.choices.push_back(chosen(backend, of, choice, follow == nullptr));
      if (follow == nullptr) return;
      if (follow->choices.size() < out.choices.size()) throw Error(ErrorKind::usage, "one side chose keys more often");
      choice = backend.upload(follow->choices[out.choices.size() - 1].keys);
    };
  walk(model, backend, text, options);
  return out;
}

void compare_forced(const std::string& what, const ForcedRun& found, const ForcedRun& reference,
                    const Settings& settings, Report& report) {
  const bool exact = !settings.bf16 && !settings.against_bf16;
  const double most = settings.most_margin.value_or(exact ? kMargin : INFINITY);
  report.note(what, fmt::format("{} against {}, attention {}", settings.side(), settings.reference().side(),
                                settings.attention));
  const std::vector<ForcedScale>& x = found.scales;
  const std::vector<ForcedScale>& y = reference.scales;
  if (x.size() != y.size() || x.empty())
    return report.check(what, fmt::format("{} scales and {}", x.size(), y.size()), false);
  Differences sum;
  for (std::size_t k = 0; k < x.size(); ++k) {
    const auto scale = static_cast<int>(k);
    const Differences greedy = differences(x[k], y[k], &ForcedScale::greedy, [](auto, auto, auto) { return 0.0; });
    const Differences sampled = differences(x[k], y[k], &ForcedScale::sampled, [&](auto picture, auto token, auto bit) {
      return turning_point(draws(), picture, scale, token, bit);
    });
    report.note(fmt::format("logits.s{}", k),
                fmt::format("largest difference {:.1e}", max_difference(x[k].logits, y[k].logits)));
    report.check(fmt::format("greedy bits.s{}", k), text_of(greedy), greedy.margin <= most);
    report.check(fmt::format("sampled bits.s{}", k), text_of(sampled), sampled.margin <= most);
    sum.add(greedy);
    sum.add(sampled);
  }
  report.note("bits of all scales", text_of(sum));
  if (settings.shares_choices()) compare_choices(found.choices, reference.choices, report);
  if (exact) return;
  report.at_least("share of equal bits", 1.0 - static_cast<double>(sum.differing) / static_cast<double>(sum.total),
                  kEqualShare);
}

}  // namespace sparvar::conformance
