#include "conformance/forced.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace sparvar::conformance {
namespace {

constexpr double kMargin = 1e-3;      // f32: nearer ones may fall either way
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

std::string text_of(const Differences& d) {
  return d.differing == 0
             ? fmt::format("0 of {} differ", d.total)
             : fmt::format("{} of {} differ, with margins of at most {:.1e}", d.differing, d.total, d.margin);
}

}  // namespace

std::vector<ForcedScale> run_forced(Infinity& model, Backend& backend, const PackedText& text, WalkOptions options,
                                    const Settings& settings) {
  const auto all = static_cast<int>(options.schedule.size());
  options.plan = plan_of(settings.attention, model.config().depth, all);
  options.order = settings.order;
  if (settings.scales > 0 && settings.scales < all) {
    options.full = options.schedule.back();
    options.schedule.resize(settings.scales);
  }
  std::vector<ForcedScale> out;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (!name.starts_with("logits_cfg.")) return;
    const auto scale = static_cast<int>(out.size());
    const auto draw = [&](const Sampling& sampling) {
      const Tensor words = backend.upload(SamplingWords(sampling, 0).to_tensor());
      return backend.download(backend.sample_bits(backend.upload(value), words, scale));
    };
    Sampling greedy;
    greedy.greedy = true;
    out.push_back({.logits = value, .greedy = draw(greedy), .sampled = draw(draws())});
  };
  walk(model, backend, text, options);
  return out;
}

void compare_forced(const std::string& what, const std::vector<ForcedScale>& found,
                    const std::vector<ForcedScale>& reference, const Settings& settings, Report& report) {
  const bool exact = !settings.bf16 && !settings.against_bf16;
  const double most = settings.most_margin.value_or(exact ? kMargin : INFINITY);
  report.note(what, fmt::format("{} against {}, attention {}", settings.side(), settings.reference().side(),
                                settings.attention));
  if (found.size() != reference.size() || found.empty())
    return report.check(what, fmt::format("{} scales and {}", found.size(), reference.size()), false);
  Differences sum;
  for (std::size_t k = 0; k < found.size(); ++k) {
    const auto scale = static_cast<int>(k);
    const Differences greedy =
        differences(found[k], reference[k], &ForcedScale::greedy, [](auto, auto, auto) { return 0.0; });
    const Differences sampled = differences(
        found[k], reference[k], &ForcedScale::sampled,
        [&](auto picture, auto token, auto bit) { return turning_point(draws(), picture, scale, token, bit); });
    report.note(fmt::format("logits.s{}", k),
                fmt::format("largest difference {:.1e}", max_difference(found[k].logits, reference[k].logits)));
    report.check(fmt::format("greedy bits.s{}", k), text_of(greedy), greedy.margin <= most);
    report.check(fmt::format("sampled bits.s{}", k), text_of(sampled), sampled.margin <= most);
    sum.add(greedy);
    sum.add(sampled);
  }
  report.note("bits of all scales", text_of(sum));
  if (exact) return;
  report.at_least("share of equal bits", 1.0 - static_cast<double>(sum.differing) / static_cast<double>(sum.total),
                  kEqualShare);
}

}  // namespace sparvar::conformance
