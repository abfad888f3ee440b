#include "core/resolutions.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sparvar {
namespace {

TEST(Resolutions, RatiosAndTheirInverses) {
  std::vector<double> ratios;
  for (const Resolution& resolution : resolutions_1m()) ratios.push_back(resolution.ratio);
  const std::vector<double> expected = {1.0,   1.25, 0.8, 1.333, 0.75, 1.5, 0.666, 1.75,
                                        0.571, 2.0,  0.5, 2.5,   0.4,  3.0, 0.333};
  ASSERT_EQ(ratios.size(), expected.size());
  for (std::size_t i = 0; i < ratios.size(); ++i) EXPECT_NEAR(ratios[i], expected[i], 1e-12);
}

TEST(Resolutions, EverySizeHasTheRatioAndNothingShrinks) {
  for (const Resolution& resolution : resolutions_1m()) {
    const ScaleSchedule& schedule = resolution.schedule;
    ASSERT_EQ(schedule.size(), 13U);
    EXPECT_EQ(schedule[0], (Grid{1, 1}));
    for (std::size_t k = 1; k < schedule.size(); ++k) {
      EXPECT_GE(schedule[k].h, schedule[k - 1].h);
      EXPECT_GE(schedule[k].w, schedule[k - 1].w);
    }
    for (const char* size : {"0.06M", "0.25M", "0.60M", "1M"}) {
      const Grid last = schedule[static_cast<std::size_t>(*scales_of_size(size)) - 1];
      EXPECT_LT(std::abs(static_cast<double>(last.h) / last.w - resolution.ratio), 0.01)
          << resolution.ratio << ' ' << size;
    }
    EXPECT_NEAR(schedule.back().tokens(), 4096, 210);
  }
}

TEST(Resolutions, Lookup) {
  ASSERT_NE(schedule_1m(0.667), nullptr);
  EXPECT_EQ(schedule_1m(0.666)->back(), (Grid{52, 78}));
  EXPECT_EQ(schedule_1m(1.75)->at(3), (Grid{7, 4}));
  EXPECT_EQ(schedule_1m(1.1), nullptr);
  EXPECT_EQ(schedule_1m(NAN), nullptr);
  EXPECT_EQ(scales_of_size("0.25M"), 10);
  EXPECT_EQ(scales_of_size("2M"), std::nullopt);
}

TEST(Resolutions, RopeGridIsTheLastOfTheOneMegapixelSchedule) {
  for (const Resolution& resolution : resolutions_1m()) {
    for (const std::size_t scales : {4U, 7U, 10U, 12U, 13U}) {
      const ScaleSchedule part(resolution.schedule.begin(),
                               resolution.schedule.begin() + static_cast<std::ptrdiff_t>(scales));
      EXPECT_EQ(rope_grid_of(part), resolution.schedule.back()) << resolution.ratio << ' ' << scales;
    }
  }
  EXPECT_EQ(rope_grid_of({{1, 1}, {2, 2}}), (Grid{64, 64}));  // every ratio begins so: the nearest
  EXPECT_EQ(rope_grid_of({}), std::nullopt);
  EXPECT_EQ(rope_grid_of({{1, 1}, {2, 2}, {5, 5}}), std::nullopt);
  ScaleSchedule longer = *schedule_1m(1.0);
  longer.push_back({80, 80});
  EXPECT_EQ(rope_grid_of(longer), std::nullopt);
}

}  // namespace
}  // namespace sparvar
