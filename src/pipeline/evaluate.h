// Ways to draw a picture against dense attention, over many pictures: how far they are apart, and what each costs.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "pipeline/compare.h"

namespace sparvar {

/// A plan, and what else is left out to save time.
struct Variant {
  std::string name;
  AttentionPlan plan;
  int skip_scales = 0;    // as in GenerateOptions
  int uncond_until = -1;  // as in GenerateOptions
};

/// PSNR of a picture that is dense attention's own, where a number is needed.
constexpr double kEqualPsnr = 100;

/// One variant in one case, against the dense picture of the same prompt and random numbers.
struct Score {
  double psnr = 0;           // dB; kEqualPsnr at most
  double ssim = 1;           // NaN where pictures are smaller than its window
  double detail_error = 0;   // image/detail.h
  double seconds = 0;        // of the whole picture
  double dense_seconds = 0;  // of the dense picture beside it
  double pairs = 1;          // query-key pairs computed over those of dense attention: the last three scales
  double all_pairs = 1;      // and all scales
  bool warm = true;          // both were drawn by a pipeline that had drawn such pictures before
};

/// A picture of a prompt in all variants. `index` counts prompts, then pictures of a prompt: it is the number that the
/// picture has in a run of `generate`.
struct CaseScores {
  int index = 0;
  std::vector<Score> scores;  // per variant
};

struct EvaluateOptions {
  GenerateOptions generate;  // prompts, pictures of each, seed, guidance; plan, skip_scales, uncond_until are not used
  std::vector<Variant> variants;  // at least one
  std::vector<CaseScores> known;  // cases that are done: they are not drawn again
  std::function<void(int done, int total, const std::string& what)> on_progress;
  /// Sees every new case, with its pictures.
  std::function<void(const CaseScores&, const Drawn& dense, const std::vector<Drawn>& drawn)> on_case;
};

/// Cases in order, known and new. The first picture, a dense one, is thrown away: it warms the pipeline up. Throws as
/// Pipeline::generate does.
std::vector<CaseScores> evaluate(Pipeline& pipeline, const EvaluateOptions& options);

/// Prompt of a case, and the options that draw it alone.
GenerateOptions options_of_case(const GenerateOptions& all, int index);

/// Of the last three scales, which presets are sparse on, the first.
int first_counted_scale(const ScaleSchedule& schedule);

/// Query-key pairs computed over those of dense attention with the same guidance, at scales `first_scale` and up:
/// decision scales, probes, and halves that guidance leaves out are counted, and what a plan computes beyond dense
/// attention at the scales before (a residual at an earlier decision scale). Skipped scales compute none.
double pairs_computed(const GenerateResult& result, const GenerateResult& dense, int first_scale);

/// The share of tokens, in thousandths, that has to run at every scale from `first_scale` on for pruned pictures to
/// compute the nearest to `share` of dense attention's pairs at the last three scales.
double keep_for_pairs(const ScaleSchedule& schedule, int first_scale, double share);

struct Spread {
  double mean = 0;
  double worst = 0;
  double deviation = 0;  // sample standard deviation; 0 for one value
};

/// A variant over all cases.
struct VariantSummary {
  Spread psnr, ssim, detail_error;
  double seconds = 0, dense_seconds = 0;  // medians of warm pictures, of all where none was warm
  double speed_up = 1;                    // median of the ratios
  double pairs = 1, all_pairs = 1;        // means
  int equal = 0;                          // pictures that are dense attention's own
  std::vector<int> worst;                 // all cases, the lowest PSNR first
};
VariantSummary summary_of(const std::vector<CaseScores>& cases, std::size_t variant);

}  // namespace sparvar
