#include "pipeline/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "image/detail.h"
#include "pipeline/median.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kCountedScales = 3;  // the last ones, where presets are sparse

Spread spread_of(const std::vector<double>& values, bool high_is_good) {
  Spread spread;
  const auto count = static_cast<double>(values.size());
  spread.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  spread.worst =
      high_is_good ? *std::min_element(values.begin(), values.end()) : *std::max_element(values.begin(), values.end());
  double squares = 0;
  for (const double value : values) squares += (value - spread.mean) * (value - spread.mean);
  if (values.size() > 1) spread.deviation = std::sqrt(squares / (count - 1));
  return spread;
}

Score score_of(const Drawn& drawn, const Drawn& dense) {
  Score score;
  score.psnr = std::min(drawn.psnr, kEqualPsnr);
  score.ssim = drawn.ssim;
  score.detail_error = detail_error(dense.image, drawn.image);
  score.seconds = drawn.result.total_seconds;
  score.dense_seconds = dense.result.total_seconds;
  score.pairs = pairs_computed(drawn.result, dense.result, first_counted_scale(dense.result.schedule));
  score.all_pairs = pairs_computed(drawn.result, dense.result, 0);
  score.warm = drawn.result.cold_batches == 0 && dense.result.cold_batches == 0;
  return score;
}

}  // namespace

GenerateOptions options_of_case(const GenerateOptions& all, int index) {
  GenerateOptions one = all;
  one.prompts = {all.prompts.at(static_cast<std::size_t>(index / all.pictures_per_prompt))};
  one.pictures_per_prompt = 1;
  one.first_picture = all.first_picture + static_cast<std::uint64_t>(index);
  return one;
}

double pairs_computed(const GenerateResult& result, const GenerateResult& dense, int first_scale) {
  double computed = 0, all = 0, keys = 0;
  for (int k = 0; k < static_cast<int>(dense.schedule.size()); ++k) {
    const double queries = dense.schedule[static_cast<std::size_t>(k)].tokens();
    keys += queries;
    const auto halves = [k](const GenerateResult& of) { return k < of.uncond_until ? 2 : 1; };
    const bool drawn = k < static_cast<int>(result.scales.size());
    const double share = drawn ? result.scales[static_cast<std::size_t>(k)].share_of_pairs : 0;
    const bool counted = k >= first_scale;
    if (counted) all += halves(dense) * queries * keys;
    computed += halves(result) * queries * keys * (counted ? share : std::max(0.0, share - 1));
  }
  return computed / all;
}

int first_counted_scale(const ScaleSchedule& schedule) {
  return std::max(0, static_cast<int>(schedule.size()) - kCountedScales);
}

double keep_for_pairs(const ScaleSchedule& schedule, int first_scale, double share) {
  double best = 1, distance = INFINITY;
  for (int thousandths = 1; thousandths <= 1000; ++thousandths) {
    AttentionPlan plan;
    plan.pruning = TokenPruning{first_scale, {thousandths / 1000.0}};
    double computed = 0, all = 0, keys = 0, all_keys = 0;
    for (int k = 0; k < static_cast<int>(schedule.size()); ++k) {
      const Grid grid = schedule[static_cast<std::size_t>(k)];
      const int run = plan.tokens_run(k, grid);
      keys += run;
      all_keys += grid.tokens();
      if (k < first_counted_scale(schedule)) continue;
      computed += run * keys;
      all += grid.tokens() * all_keys;
    }
    const double off = std::abs(computed / all - share);
    if (off > distance) break;  // pairs grow with the share that is kept
    if (off < distance) best = thousandths / 1000.0;
    distance = off;
  }
  return best;
}

std::vector<CaseScores> evaluate(Pipeline& pipeline, const EvaluateOptions& options) {
  if (options.variants.empty()) throw Error(ErrorKind::usage, "nothing to compare with dense attention: no plan");
  if (options.generate.prompts.empty() || options.generate.pictures_per_prompt < 1)
    throw Error(ErrorKind::usage, "nothing to draw: no prompt");
  const AttentionPlan dense_plan{"dense", {}};
  std::vector<CaseScores> cases = options.known;
  const int total = static_cast<int>(options.generate.prompts.size()) * options.generate.pictures_per_prompt;
  const auto tell = [&](int done, const std::string& what) {
    if (options.on_progress) options.on_progress(done, total, what);
  };
  bool warm = false;
  for (int index = 0; index < total; ++index) {
    const auto is_this = [index](const CaseScores& known) { return known.index == index; };
    if (std::any_of(cases.begin(), cases.end(), is_this)) continue;
    const GenerateOptions one = options_of_case(options.generate, index);
    const int done = static_cast<int>(cases.size());
    if (!warm) {
      tell(done, "warming up");
      (void)draw(pipeline, one, dense_plan);
      warm = true;
    }
    tell(done, "dense");
    Drawn dense = draw_warm(pipeline, one, dense_plan);
    dense.psnr = INFINITY;
    CaseScores scores{index, {}};
    std::vector<Drawn> drawn;
    for (const Variant& variant : options.variants) {
      tell(done, variant.name);
      GenerateOptions varied = one;
      varied.skip_scales = variant.skip_scales;
      varied.uncond_until = variant.uncond_until;
      drawn.push_back(draw_warm(pipeline, varied, variant.plan));
      measure(drawn.back(), dense.image);
      scores.scores.push_back(score_of(drawn.back(), dense));
    }
    if (options.on_case) options.on_case(scores, dense, drawn);
    cases.push_back(std::move(scores));
  }
  std::sort(cases.begin(), cases.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
  tell(total, "done");
  return cases;
}

VariantSummary summary_of(const std::vector<CaseScores>& cases, std::size_t variant) {
  if (cases.empty()) throw Error(ErrorKind::usage, "nothing was drawn: no case to sum up");
  const bool any_warm =
      std::any_of(cases.begin(), cases.end(), [variant](const CaseScores& one) { return one.scores.at(variant).warm; });
  std::vector<double> psnr, ssim, detail, seconds, dense, ratios, pairs, all_pairs;
  VariantSummary summary;
  for (const CaseScores& one : cases) {
    const Score& score = one.scores.at(variant);
    psnr.push_back(score.psnr);
    ssim.push_back(score.ssim);
    detail.push_back(score.detail_error);
    pairs.push_back(score.pairs);
    all_pairs.push_back(score.all_pairs);
    if (score.psnr >= kEqualPsnr) ++summary.equal;
    if (any_warm && !score.warm) continue;
    seconds.push_back(score.seconds);
    dense.push_back(score.dense_seconds);
    ratios.push_back(score.dense_seconds / score.seconds);
  }
  summary.psnr = spread_of(psnr, true);
  summary.ssim = spread_of(ssim, true);
  summary.detail_error = spread_of(detail, false);
  summary.seconds = median(seconds);
  summary.dense_seconds = median(dense);
  summary.speed_up = median(ratios);
  summary.pairs = spread_of(pairs, false).mean;
  summary.all_pairs = spread_of(all_pairs, false).mean;
  std::vector<std::size_t> order(cases.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return psnr[a] < psnr[b]; });
  for (const std::size_t at : order) summary.worst.push_back(cases[at].index);
  return summary;
}

}  // namespace sparvar
