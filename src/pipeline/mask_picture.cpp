#include "pipeline/mask_picture.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "attention/csla.h"
#include "image/canvas.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr Colour kPaper{255, 255, 255};
constexpr Colour kLine{236, 112, 20};
constexpr Colour kInk{16, 40, 96};
constexpr Colour kText{60, 60, 60};
constexpr int kCaption = kCellHeight + 3;
constexpr int kLargestSide = 32768;

int pixels(int tokens, int per_pixel) { return (tokens + per_pixel - 1) / per_pixel; }

Colour shade(double share) {
  if (share <= 0) return kPaper;
  const double ink = 0.15 + 0.85 * share;
  const auto mix = [&](std::uint8_t paper, std::uint8_t dark) {
    return static_cast<std::uint8_t>(std::lround(paper + ink * (dark - paper)));
  };
  return {mix(kPaper.r, kInk.r), mix(kPaper.g, kInk.g), mix(kPaper.b, kInk.b)};
}

/// Adds keys of a tile to the pixels across, each weighing `weight`.
class Row {
 public:
  Row(const MaskLayout& layout, const std::vector<int>& first) : layout_(layout), first_(first), sums_(layout.width) {}
  void add(KeyRun run, double weight) {
    for (int key = run.begin; key < run.begin + run.count; ++key) {
      while (key >= first_[scale_ + 1]) ++scale_;
      while (key < first_[scale_]) --scale_;
      sums_[column(key)] += weight;
    }
  }
  const std::vector<double>& sums() const { return sums_; }
  void clear() { std::fill(sums_.begin(), sums_.end(), 0.0); }

 private:
  int column(int key) const { return layout_.column[scale_] + (key - first_[scale_]) / layout_.tokens_per_pixel; }
  const MaskLayout& layout_;
  const std::vector<int>& first_;
  std::vector<double> sums_;
  int scale_ = 0;  // of the last key
};

/// Keys that each pixel across stands for.
std::vector<double> keys_across(const MaskLayout& layout, const std::vector<int>& first) {
  Row row(layout, first);
  row.add({0, first.back()}, 1.0);
  return row.sums();
}

/// Pairs computed, [height of the mask][width], mean over lists.
std::vector<double> count_pairs(const Mask& mask, const MaskLayout& layout, const std::vector<int>& first) {
  std::vector<double> pairs(static_cast<std::size_t>(layout.height - layout.top) * layout.width, 0.0);
  Row row(layout, first);
  for (int t = 0; t < mask.tiles.count(); ++t) {
    row.clear();
    for (int list = 0; list < mask.lists.lists; ++list) {
      const std::int64_t at = static_cast<std::int64_t>(list) * mask.lists.tiles + t;
      for (std::int64_t r = mask.lists.offset[at]; r < mask.lists.offset[at + 1]; ++r)
        row.add(mask.lists.runs[r], 1.0 / mask.lists.lists);
    }
    for (int i = mask.tiles.offset[t]; i < mask.tiles.offset[t + 1]; ++i) {
      double* to = pairs.data() + static_cast<std::size_t>(mask.tiles.rows[i] / layout.tokens_per_pixel) * layout.width;
      for (int x = 0; x < layout.width; ++x) to[x] += row.sums()[x];
    }
  }
  return pairs;
}

void draw_captions(Image& image, const MaskLayout& layout, const ScaleSchedule& schedule, int k) {
  for (int j = 0; j <= k; ++j) {
    const int room = (j < k ? layout.column[j + 1] - 1 : layout.width) - layout.column[j];
    const std::string grid = fmt::format("{}x{}", schedule[j].h, schedule[j].w);
    if (characters(grid) * kCellWidth <= room) draw_text(image, layout.column[j] + 1, 2, grid, 1, kText);
    if (j > 0) fill(image, layout.column[j] - 1, 0, 1, layout.height, kLine);
  }
  fill(image, 0, layout.top - 1, layout.width, 1, kLine);
}

}  // namespace

MaskLayout mask_layout(const ScaleSchedule& schedule, int k, int tokens_per_pixel) {
  MaskLayout layout{tokens_per_pixel, 0, kCaption, kCaption + pixels(schedule[k].tokens(), tokens_per_pixel), {}};
  for (int j = 0; j <= k; ++j) {
    if (j > 0) ++layout.width;  // the line
    layout.column.push_back(layout.width);
    layout.width += pixels(schedule[j].tokens(), tokens_per_pixel);
  }
  if (layout.width > kLargestSide || layout.height > kLargestSide)
    throw Error(ErrorKind::usage,
                fmt::format("a mask of {}x{} pixels is larger than {}; take more tokens a pixel than {}", layout.width,
                            layout.height, kLargestSide, tokens_per_pixel));
  return layout;
}

int tokens_per_pixel_for(const ScaleSchedule& schedule, int k, int side) {
  int tokens = 1;
  const auto width = [&](int per_pixel) {
    int sum = k;
    for (int j = 0; j <= k; ++j) sum += pixels(schedule[j].tokens(), per_pixel);
    return sum;
  };
  while (width(tokens) > side && width(tokens) > 2 * k + 1) ++tokens;
  return tokens;
}

Image draw_mask(const Mask& mask, const ScaleSchedule& schedule, int k, int tokens_per_pixel) {
  const MaskLayout layout = mask_layout(schedule, k, tokens_per_pixel);
  const std::vector<int> first = first_keys(schedule, k);
  const std::vector<double> across = keys_across(layout, first);
  const std::vector<double> pairs = count_pairs(mask, layout, first);
  Image image = blank(layout.width, layout.height, kPaper);
  const int queries = schedule[k].tokens();
  for (int y = 0; y < layout.height - layout.top; ++y) {
    const int rows = std::min(tokens_per_pixel, queries - y * tokens_per_pixel);
    for (int x = 0; x < layout.width; ++x) {
      const double share = pairs[static_cast<std::size_t>(y) * layout.width + x] / std::max(1.0, across[x] * rows);
      if (share > 0) fill(image, x, layout.top + y, 1, 1, shade(std::min(share, 1.0)));
    }
  }
  draw_captions(image, layout, schedule, k);
  return image;
}

}  // namespace sparvar
