#include "core/resolutions.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace sparvar {
namespace {

std::vector<Resolution> build_resolutions() {
  const std::vector<Resolution> tall = {
      {1.000,
       {{1, 1},
        {2, 2},
        {4, 4},
        {6, 6},
        {8, 8},
        {12, 12},
        {16, 16},
        {20, 20},
        {24, 24},
        {32, 32},
        {40, 40},
        {48, 48},
        {64, 64}}},
      {1.250,
       {{1, 1},
        {2, 2},
        {3, 3},
        {5, 4},
        {10, 8},
        {15, 12},
        {20, 16},
        {25, 20},
        {30, 24},
        {35, 28},
        {45, 36},
        {55, 44},
        {70, 56}}},
      {1.333,
       {{1, 1},
        {2, 2},
        {4, 3},
        {8, 6},
        {12, 9},
        {16, 12},
        {20, 15},
        {24, 18},
        {28, 21},
        {36, 27},
        {48, 36},
        {60, 45},
        {72, 54}}},
      {1.500,
       {{1, 1},
        {2, 2},
        {3, 2},
        {6, 4},
        {9, 6},
        {15, 10},
        {21, 14},
        {27, 18},
        {33, 22},
        {39, 26},
        {48, 32},
        {63, 42},
        {78, 52}}},
      {1.750,
       {{1, 1},
        {2, 2},
        {3, 3},
        {7, 4},
        {11, 6},
        {14, 8},
        {21, 12},
        {28, 16},
        {35, 20},
        {42, 24},
        {56, 32},
        {70, 40},
        {84, 48}}},
      {2.000,
       {{1, 1},
        {2, 2},
        {4, 2},
        {6, 3},
        {10, 5},
        {16, 8},
        {22, 11},
        {30, 15},
        {38, 19},
        {46, 23},
        {60, 30},
        {74, 37},
        {90, 45}}},
      {2.500,
       {{1, 1},
        {2, 2},
        {5, 2},
        {10, 4},
        {15, 6},
        {20, 8},
        {25, 10},
        {30, 12},
        {40, 16},
        {50, 20},
        {65, 26},
        {80, 32},
        {100, 40}}},
      {3.000,
       {{1, 1},
        {2, 2},
        {6, 2},
        {9, 3},
        {15, 5},
        {21, 7},
        {27, 9},
        {36, 12},
        {45, 15},
        {54, 18},
        {72, 24},
        {90, 30},
        {111, 37}}},
  };
  std::vector<Resolution> all;
  for (const Resolution& resolution : tall) {
    all.push_back(resolution);
    if (resolution.ratio == 1.0) continue;
    Resolution wide{std::floor(1000.0 / resolution.ratio) / 1000.0, resolution.schedule};
    for (Grid& grid : wide.schedule) std::swap(grid.h, grid.w);
    all.push_back(std::move(wide));
  }
  return all;
}

}  // namespace

const std::vector<Resolution>& resolutions_1m() {
  static const std::vector<Resolution> all = build_resolutions();
  return all;
}

const ScaleSchedule* schedule_1m(double ratio) {
  for (const Resolution& resolution : resolutions_1m())
    if (std::abs(resolution.ratio - ratio) <= 0.002) return &resolution.schedule;
  return nullptr;
}

std::optional<int> scales_of_size(std::string_view size) {
  for (const auto& [name, scales] : kSizes)
    if (name == size) return scales;
  return std::nullopt;
}

const Resolution* resolution_of(const ScaleSchedule& schedule) {
  if (schedule.empty()) return nullptr;
  const double ratio = static_cast<double>(schedule.back().h) / schedule.back().w;
  double nearest = std::numeric_limits<double>::infinity();
  const Resolution* found = nullptr;
  for (const Resolution& resolution : resolutions_1m()) {
    const ScaleSchedule& full = resolution.schedule;
    if (schedule.size() > full.size() || !std::equal(schedule.begin(), schedule.end(), full.begin())) continue;
    const double distance = std::abs(resolution.ratio - ratio);
    if (distance >= nearest) continue;
    nearest = distance;
    found = &resolution;
  }
  return found;
}

std::optional<Grid> rope_grid_of(const ScaleSchedule& schedule) {
  const Resolution* resolution = resolution_of(schedule);
  if (resolution == nullptr) return std::nullopt;
  return resolution->schedule.back();
}

}  // namespace sparvar
