// RoPE tables of the three modes against plain double precision.
#include <gtest/gtest.h>

#include <cmath>

#include "models/infinity/infinity.h"
#include "support.h"

namespace sparvar {
namespace {

double angle(double position, int pair, int head_dim) {
  return position * std::pow(10000.0, -2.0 * pair / (head_dim / 2.0));
}

TEST(Rope, RoundedPositionsReachTheLastGrid) {
  const Grid grid{10, 15}, reference{56, 84};
  const int dim = 40;
  const Tensor table = rope_table(grid, reference, dim, 10000.0, 2);
  ASSERT_EQ(table.shape(), (Shape{150, 20, 2}));
  for (int y = 0; y < grid.h; ++y)
    for (int x = 0; x < grid.w; ++x)
      for (int pair = 0; pair < dim / 2; ++pair) {
        const bool row = pair < dim / 4;
        const double position = row ? std::nearbyint(y * 5.6) : std::nearbyint(x * 5.6);
        const double a = angle(position, row ? pair : pair - dim / 4, dim);
        const float* found = table.data<float>() + ((y * grid.w + x) * dim / 2 + pair) * 2;
        ASSERT_NEAR(found[0], std::cos(a), 2e-5) << y << ", " << x << ", pair " << pair;
        ASSERT_NEAR(found[1], std::sin(a), 2e-5);
      }
}

TEST(Rope, PlainPositions) {
  const Tensor table = rope_table({4, 3}, {64, 64}, 16, 10000.0, 0);
  for (int y = 0; y < 4; ++y)
    for (int x = 0; x < 3; ++x)
      for (int pair = 0; pair < 4; ++pair) {
        EXPECT_NEAR(table.data<float>()[((y * 3 + x) * 8 + pair) * 2], std::cos(angle(y, pair, 16)), 1e-6);
        EXPECT_NEAR(table.data<float>()[((y * 3 + x) * 8 + 4 + pair) * 2 + 1], std::sin(angle(x, pair, 16)), 1e-6);
      }
}

TEST(Rope, InterpolatedTableEndsAtItsLastRow) {
  // Mode 1 stretches 128 positions (the longer side) over the grid: first and last rows are exact, the middle is a
  // mean.
  const Tensor table = rope_table({3, 2}, {64, 32}, 16, 10000.0, 1);
  for (int pair = 0; pair < 4; ++pair) {
    const auto at = [&](int y, int x, int p) { return table.data<float>()[((y * 2 + x) * 8 + p) * 2]; };
    EXPECT_NEAR(at(0, 0, pair), 1.0, 1e-6);
    EXPECT_NEAR(at(2, 0, pair), std::cos(angle(127, pair, 16)), 1e-5);
    EXPECT_NEAR(at(1, 0, pair), (std::cos(angle(63, pair, 16)) + std::cos(angle(64, pair, 16))) / 2, 1e-5);
    EXPECT_NEAR(at(0, 1, 4 + pair), std::cos(angle(63, pair, 16)), 1e-5) << "columns: 64 positions";
  }
}

}  // namespace
}  // namespace sparvar
