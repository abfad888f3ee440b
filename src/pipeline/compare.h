// Plans beside dense attention: the same prompt and seed, how far the pictures are apart, what each plan cost.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sparvar/pipeline.h"

namespace sparvar {

struct CompareOptions {
  GenerateOptions generate;          // one prompt, one picture; the plan of it is not used
  std::vector<AttentionPlan> plans;  // at least one
  bool warm_up = true;               // one dense picture is drawn and thrown away first: only warm times compare
};

/// One way to draw the picture.
struct Drawn {
  AttentionPlan plan;
  Image image;
  GenerateResult result;  // times; its pictures are in `image`
  double psnr = 0;        // against dense; infinite where nothing differs
  double ssim = 1;
};

struct Comparison {
  Drawn dense;
  std::vector<Drawn> plans;
  double cold_seconds = 0;  // of the picture thrown away; 0: there was none
};

/// The one picture of `options` with `plan`. Throws as Pipeline::generate does, and Error(usage) for several pictures.
Drawn draw(Pipeline& pipeline, GenerateOptions options, const AttentionPlan& plan);
/// The same; where a device had to record programs for it, as a GPU does for every plan and shape anew, it is drawn
/// again: times of pictures that come after are what compares.
Drawn draw_warm(Pipeline& pipeline, const GenerateOptions& options, const AttentionPlan& plan);
/// Fills in psnr and ssim (NaN where the picture is smaller than SSIM's window).
void measure(Drawn& drawn, const Image& dense);

/// Throws as Pipeline::generate does.
Comparison compare(Pipeline& pipeline, const CompareOptions& options);

/// One row a plan: dense, the plan's picture, the difference times `gain` on gray; a caption under each, `title` above.
Image comparison_sheet(const Comparison& comparison, const std::string& title, int gain);

/// Of query-key pairs at the scales where `plan` computes fewer than all: the share it computes. 1 where it has none.
double sparse_share(const GenerateResult& result);

}  // namespace sparvar
