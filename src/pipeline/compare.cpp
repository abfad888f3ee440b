#include "pipeline/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "image/canvas.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr Colour kPaper{236, 236, 236};  // darker than a white picture: its border shows
constexpr Colour kInk{24, 24, 24};
constexpr int kMargin = 8;
constexpr int kSmallestSimilar = 11;  // the side of SSIM's window

/// Text in a column: what it is drawn with, and how many lines that takes.
struct Writing {
  int size = 1;
  int columns = 1;
  int line_height() const { return kCellHeight * size; }
};

Writing writing_for(int width) {
  Writing writing;
  writing.size = width >= 512 ? 2 : 1;
  writing.columns = std::max(1, width / (kCellWidth * writing.size));
  return writing;
}

void write_lines(Image& sheet, int x, int y, const std::vector<std::string>& lines, const Writing& writing) {
  for (const std::string& line : lines) {
    draw_text(sheet, x, y, line, writing.size, kInk);
    y += writing.line_height();
  }
}

std::string caption(const Drawn& drawn) {
  std::string text = fmt::format("{}: {:.2f} s", drawn.plan.name, drawn.result.total_seconds);
  if (const double share = sparse_share(drawn.result); share < 1)
    text += fmt::format(", {:.1f} % of the pairs of its sparse scales", 100 * share);
  return text;
}

std::string caption(const Drawn& drawn, int gain) {
  if (std::isinf(drawn.psnr)) return "no difference";
  return fmt::format("difference x{}: PSNR {:.2f} dB, SSIM {:.4f}", gain, drawn.psnr, drawn.ssim);
}

Drawn draw_once(Pipeline& pipeline, const GenerateOptions& options, const AttentionPlan& plan) {
  return draw(pipeline, options, plan);
}

}  // namespace

Drawn draw(Pipeline& pipeline, GenerateOptions options, const AttentionPlan& plan) {
  if (options.prompts.size() != 1 || options.pictures_per_prompt != 1)
    throw Error(ErrorKind::usage, "one picture of one prompt is compared at a time");
  options.plan = plan;
  Drawn drawn{plan, {}, pipeline.generate(options)};
  drawn.image = std::move(drawn.result.pictures.front().image);
  drawn.result.pictures.clear();
  return drawn;
}

Drawn draw_warm(Pipeline& pipeline, const GenerateOptions& options, const AttentionPlan& plan) {
  Drawn drawn = draw(pipeline, options, plan);
  return drawn.result.recordings == 0 ? drawn : draw(pipeline, options, plan);
}

void measure(Drawn& drawn, const Image& dense) {
  drawn.psnr = psnr(dense, drawn.image);
  const bool large = std::min(drawn.image.width, drawn.image.height) >= kSmallestSimilar;
  drawn.ssim = large ? ssim(dense, drawn.image) : NAN;
}

double sparse_share(const GenerateResult& result) {
  double computed = 0, all = 0, keys = 0;
  for (const ScaleTiming& scale : result.scales) {
    keys += scale.grid.tokens();
    if (scale.share_of_pairs == 1) continue;
    const double pairs = keys * scale.grid.tokens();
    computed += scale.share_of_pairs * pairs;
    all += pairs;
  }
  return all > 0 ? computed / all : 1;
}

Comparison compare(Pipeline& pipeline, const CompareOptions& options) {
  if (options.plans.empty()) throw Error(ErrorKind::usage, "nothing to compare with dense attention: no plan");
  const AttentionPlan dense{"dense", {}};
  Comparison out;
  if (options.warm_up) out.cold_seconds = draw(pipeline, options.generate, dense).result.total_seconds;
  const auto drawn_with = options.warm_up ? draw_warm : draw_once;
  out.dense = drawn_with(pipeline, options.generate, dense);
  out.dense.psnr = INFINITY;
  for (const AttentionPlan& plan : options.plans) {
    Drawn drawn = drawn_with(pipeline, options.generate, plan);
    measure(drawn, out.dense.image);
    out.plans.push_back(std::move(drawn));
  }
  return out;
}

Image comparison_sheet(const Comparison& comparison, const std::string& title, int gain) {
  const Image& dense = comparison.dense.image;
  const Writing writing = writing_for(dense.width);
  const int width = 3 * dense.width + 4 * kMargin;
  const std::vector<std::string> head =
      wrapped(title, std::max(1, (width - 2 * kMargin) / (kCellWidth * writing.size)));
  struct Row {
    std::vector<std::string> captions[3];
    int lines = 0;
  };
  std::vector<Row> rows;
  const auto text_height = [&](std::size_t lines) { return static_cast<int>(lines) * writing.line_height(); };
  int height = kMargin + text_height(head.size());
  for (const Drawn& drawn : comparison.plans) {
    Row row{{wrapped(caption(comparison.dense), writing.columns), wrapped(caption(drawn), writing.columns),
             wrapped(caption(drawn, gain), writing.columns)}};
    for (const auto& lines : row.captions) row.lines = std::max(row.lines, static_cast<int>(lines.size()));
    height += 2 * kMargin + dense.height + text_height(static_cast<std::size_t>(row.lines));
    rows.push_back(std::move(row));
  }
  Image sheet = blank(width, height + kMargin, kPaper);
  write_lines(sheet, kMargin, kMargin, head, writing);
  int y = kMargin + text_height(head.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Image& sparse = comparison.plans[i].image;
    const Image difference = amplified_difference(dense, sparse, gain);
    const Image* pictures[3] = {&dense, &sparse, &difference};
    y += kMargin;
    for (int column = 0; column < 3; ++column) {
      const int x = kMargin + column * (dense.width + kMargin);
      paste(sheet, *pictures[column], x, y);
      write_lines(sheet, x, y + dense.height + kMargin, rows[i].captions[column], writing);
    }
    y += kMargin + dense.height + text_height(static_cast<std::size_t>(rows[i].lines));
  }
  return sheet;
}

}  // namespace sparvar
