#include "pipeline/heat_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "image/canvas.h"
#include "pipeline/mask_picture.h"

namespace sparvar {
namespace {

constexpr Colour kLine{120, 160, 220};
constexpr Colour kText{60, 60, 60};
constexpr int kCaption = kCellHeight + 3;

/// From a sixteenth of even attention to 256 times as much, in even steps of the logarithm.
Colour heat(double relative) {
  constexpr std::array<Colour, 5> kStops = {
      Colour{255, 255, 255}, {255, 226, 140}, {240, 120, 40}, {150, 20, 60}, {20, 0, 30}};
  const double t = std::clamp((std::log2(std::max(relative, 1e-9)) + 4) / 12, 0.0, 1.0) * (kStops.size() - 1);
  const auto low = std::min(static_cast<std::size_t>(t), kStops.size() - 2);
  const double weight = t - static_cast<double>(low);
  const auto mix = [&](std::uint8_t a, std::uint8_t b) {
    return static_cast<std::uint8_t>(std::lround(a + weight * (b - a)));
  };
  const Colour &a = kStops[low], &b = kStops[low + 1];
  return {mix(a.r, b.r), mix(a.g, b.g), mix(a.b, b.b)};
}

/// One head: mean probability of the keys of each pixel, over that of even attention.
void draw_head(Image& image, const SampledAttention& sample, int head, const ScaleSchedule& schedule,
               const MaskLayout& layout, int top) {
  for (int i = 0; i < static_cast<int>(sample.tokens.size()); ++i) {
    const float* weights = sample.row(head, i);
    for (int j = 0; j <= sample.scale; ++j) {
      const int tokens = schedule[static_cast<std::size_t>(j)].tokens();
      for (int key = 0; key < tokens; key += layout.tokens_per_pixel) {
        const int end = std::min(key + layout.tokens_per_pixel, tokens);
        double sum = 0;
        for (int t = key; t < end; ++t) sum += weights[t];
        fill(image, layout.column[static_cast<std::size_t>(j)] + key / layout.tokens_per_pixel, top + i, 1, 1,
             heat(sum / (end - key) * sample.keys));
      }
      weights += tokens;
    }
  }
}

}  // namespace

Image heat_map(const SampledAttention& sample, const ScaleSchedule& schedule, int per_pixel) {
  const MaskLayout layout = mask_layout(schedule, sample.scale, per_pixel);
  const int strip = kCaption + static_cast<int>(sample.tokens.size());
  Image image = blank(layout.width, kCaption + sample.heads * strip, {255, 255, 255});
  for (int head = 0; head < sample.heads; ++head) {
    const int top = kCaption + head * strip;
    draw_text(image, 1, top + 2, fmt::format("layer {}, head {}, scale {}", sample.layer, head, sample.scale), 1,
              kText);
    draw_head(image, sample, head, schedule, layout, top + kCaption);
  }
  for (int j = 0; j <= sample.scale; ++j) {
    const auto at = static_cast<std::size_t>(j);
    const int room = (j < sample.scale ? layout.column[at + 1] - 1 : layout.width) - layout.column[at];
    const std::string grid = fmt::format("{}x{}", schedule[at].h, schedule[at].w);
    if (characters(grid) * kCellWidth <= room) draw_text(image, layout.column[at] + 1, 2, grid, 1, kText);
    if (j > 0) fill(image, layout.column[at] - 1, 0, 1, image.height, kLine);
  }
  return image;
}

}  // namespace sparvar
