#include <algorithm>
#include <cmath>
#include <vector>

#include "models/infinity/infinity.h"

namespace sparvar {
namespace {

constexpr int kTableSide = 128;  // upstream's max_height = max_width = 2048 / 16

/// cos and sin of `count` positions along one axis: [count][quarter][2].
using AxisTable = std::vector<float>;

void put(AxisTable& table, float position, const std::vector<float>& frequencies) {
  for (const float frequency : frequencies) {
    const float angle = position * frequency;
    table.push_back(std::cos(angle));
    table.push_back(std::sin(angle));
  }
}

/// Mode 1: upstream resizes the table of `span` integer positions bilinearly to `count` entries (align_corners = true).
void put_interpolated(AxisTable& table, int i, int count, int span, const std::vector<float>& frequencies) {
  const float place =
      count > 1 ? static_cast<float>(i) * static_cast<float>(span - 1) / static_cast<float>(count - 1) : 0.0F;
  const int low = std::min(static_cast<int>(place), span - 1);
  const int high = std::min(low + 1, span - 1);
  const float weight = place - static_cast<float>(low);
  for (const float frequency : frequencies) {
    const float a = static_cast<float>(low) * frequency;
    const float b = static_cast<float>(high) * frequency;
    table.push_back(std::cos(a) * (1 - weight) + std::cos(b) * weight);
    table.push_back(std::sin(a) * (1 - weight) + std::sin(b) * weight);
  }
}

AxisTable axis_table(int count, int reference, int longest, int mode, const std::vector<float>& frequencies) {
  AxisTable table;
  // The table's longer side is kTableSide; the other keeps the last grid's ratio.
  const int span =
      reference == longest ? kTableSide : static_cast<int>(static_cast<double>(kTableSide) / longest * reference);
  for (int i = 0; i < count; ++i) {
    if (mode == 0) put(table, static_cast<float>(i), frequencies);
    if (mode == 1) put_interpolated(table, i, count, span, frequencies);
    if (mode == 2) {
      const float ratio = static_cast<float>(static_cast<double>(reference) / count);
      put(table, std::nearbyint(static_cast<float>(i) * ratio), frequencies);
    }
  }
  return table;
}

}  // namespace

Tensor rope_table(Grid grid, Grid reference, int head_dim, double base, int mode) {
  const int half = head_dim / 2;
  std::vector<float> frequencies;
  for (int i = 0; i < half; i += 2)
    frequencies.push_back(1.0F / static_cast<float>(std::pow(static_cast<float>(base),
                                                             static_cast<float>(i) / static_cast<float>(half))));
  const int longest = std::max(reference.h, reference.w);
  const AxisTable rows = axis_table(grid.h, reference.h, longest, mode, frequencies);
  const AxisTable columns = axis_table(grid.w, reference.w, longest, mode, frequencies);

  Tensor table = Tensor::empty(DType::f32, {grid.tokens(), half, 2});
  float* out = table.data<float>();
  for (int y = 0; y < grid.h; ++y)
    for (int x = 0; x < grid.w; ++x) {
      out = std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(y) * half, half, out);
      out = std::copy_n(columns.begin() + static_cast<std::ptrdiff_t>(x) * half, half, out);
    }
  return table;
}

}  // namespace sparvar
