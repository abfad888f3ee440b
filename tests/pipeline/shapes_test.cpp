// Ratios and sizes, skipped scales, the end of guidance, previews.
#include <gtest/gtest.h>

#include <cmath>

#include "core/resolutions.h"
#include "pipeline/job.h"
#include "pipeline/picture_shape.h"
#include "pipeline/small_model.h"
#include "pipeline/walk.h"

namespace sparvar {
namespace {

using testing::Small;

std::string complaint(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::usage);
    return error.what();
  }
  return "";
}

/// Bits of every scale of a walk, and its codes.
struct Walked {
  std::vector<Tensor> bits, logits;
  Tensor codes;
};

Walked walked(Small& small, WalkOptions options, const std::vector<int>& lengths = {4, 7}) {
  Walked out;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name.starts_with("bits.")) out.bits.push_back(value.to(DType::f32));
    if (name.starts_with("logits_cfg.")) out.logits.push_back(value.to(DType::f32));
  };
  std::vector<unsigned> seeds;
  for (std::size_t i = 0; i < lengths.size(); ++i) seeds.push_back(static_cast<unsigned>(i + 1));
  out.codes = walk(small.model, *small.backend, Small::texts(lengths, seeds), options);
  return out;
}

TEST(PictureShape, EveryRatioAndSizeOfTheTables) {
  const ModelConfig config = Small().config;
  int seen = 0;
  for (const char* aspect :
       {"1:1", "4:5", "5:4", "3:4", "4:3", "2:3", "3:2", "4:7", "7:4", "1:2", "2:1", "2:5", "5:2", "1:3", "3:1"}) {
    const int w = aspect[0] - '0', h = aspect[2] - '0';
    for (const SizeName& size : kSizes) {
      const PictureShape shape = picture_shape(config, aspect, std::string(size.name), 13);
      ASSERT_EQ(shape.schedule.size(), static_cast<std::size_t>(size.scales));
      EXPECT_NEAR(static_cast<double>(shape.schedule.back().h) / shape.schedule.back().w, static_cast<double>(h) / w,
                  0.02 * h / w)
          << aspect << ' ' << size.name;
      EXPECT_EQ(shape.rope_grid, schedule_1m(std::floor(1000.0 * h / w) / 1000)->back()) << aspect;
      ++seen;
    }
  }
  EXPECT_EQ(seen, 4 * static_cast<int>(resolutions_1m().size()));
  EXPECT_EQ(picture_shape(config, "16:9", "", 13).schedule, picture_shape(config, "7:4", "1M", 13).schedule);
  EXPECT_EQ(picture_shape(config, "", "", 13).schedule, config.schedule);
  EXPECT_EQ(picture_shape(config, "", "0.25M", 13).schedule.back(), (Grid{32, 32}));
  EXPECT_EQ(picture_shape(config, "", "0.25M", 13).rope_grid, (Grid{64, 64}));
}

TEST(PictureShape, NamesTheNearest) {
  ModelConfig config = Small().config;
  const auto said = [&](const char* aspect, const char* size, int levels = 13) {
    return complaint([&] { picture_shape(config, aspect, size, levels); });
  };
  EXPECT_NE(said("7:5", "").find("nearest is 4:3"), std::string::npos) << said("7:5", "");
  EXPECT_NE(said("100:1", "").find("nearest is 3:1"), std::string::npos);
  EXPECT_NE(said("", "0.3M").find("nearest is 0.25M"), std::string::npos);
  EXPECT_NE(said("", "4M").find("nearest is 1M"), std::string::npos);
  EXPECT_NE(said("", "1M", 12).find("nearest it has is 0.60M"), std::string::npos) << said("", "1M", 12);
  for (const char* aspect : {"1", ":", "1:", "0:1", "-1:1", "nan:1", "inf:1", "1:1:1", "a:b", "1e400:1"})
    EXPECT_NE(said(aspect, "").find("width:height"), std::string::npos) << aspect;
  EXPECT_NE(said("", "huge"), "");
  config.schedule = {{1, 1}, {3, 3}};
  EXPECT_NE(said("1:1", "").find("scales of its own"), std::string::npos);
  EXPECT_EQ(said("", ""), "");
}

TEST(Uncond, UntilTheLastScaleIsTheNormalResult) {
  Small small;
  WalkOptions options = small.options();
  const Tensor normal = walked(small, options).codes;
  options.uncond_until = 6;
  EXPECT_EQ(testing::max_difference(normal, walked(small, options).codes), 0);
}

TEST(Uncond, GuidanceOfOneIsNoGuidance) {
  for (const char* plan : {"dense", "sparse"})
    for (const int until : {1, 3, 5}) {
      Small small;
      WalkOptions options = small.options();
      if (plan[0] == 's') {  // decided with both halves, carried with one
        Cs4aAttention cs4a;
        cs4a.decision_scale = 2;
        cs4a.share = 0.5;
        cs4a.granularity = 1;
        cs4a.group = {2, 2, 0};
        options.plan = {"test", {{0, -1, 2, -1, cs4a}}};
      }
      for (int k = until; k < 6; ++k) options.cfg[static_cast<std::size_t>(k)] = 1.0F;
      const Walked both = walked(small, options);
      options.uncond_until = until;
      const Walked one = walked(small, options);
      ASSERT_EQ(both.logits.size(), 6U);
      // Sums in another order (the products have half the rows) round differently, and no more than that.
      for (std::size_t k = 0; k < 6; ++k) {
        EXPECT_LT(testing::max_difference(both.logits[k], one.logits[k]), 2e-3) << plan << ' ' << until << ' ' << k;
        EXPECT_EQ(testing::max_difference(both.bits[k], one.bits[k]), 0) << plan << ' ' << until << ' ' << k;
      }
    }
}

TEST(Uncond, FromTheFirstScaleOnIsNoGuidanceAtAll) {
  Small small;
  WalkOptions options = small.options();
  options.uncond_until = 0;
  const Tensor none = walked(small, options).codes;
  options.uncond_until = StateShape::kAllScales;
  EXPECT_GT(testing::max_difference(none, walked(small, options).codes), 0);
  options.cfg.assign(6, 1.0F);
  EXPECT_EQ(testing::max_difference(none, walked(small, options).codes), 0);
}

TEST(Uncond, ACancelledWalkIsRepeatedAsIfItHadNotBeen) {
  Small small;
  const StateShape shape{.pictures = 1,
                         .uncond_until = 3,
                         .schedule = small.options().schedule,
                         .rope_grid = small.options().rope_grid,
                         .plan = {},
                         .text_tokens = 4};
  Walk walk_once(small.model, *small.backend, shape);
  WalkInputs inputs = small.options();
  const Tensor first = walk_once.run(Small::texts({4}, {1}), inputs).to(DType::f32);
  std::atomic<bool> cancel{false};
  inputs.cancel = &cancel;
  inputs.on_scale = [&](const ScaleTiming&, int k) { cancel = k == 3; };
  EXPECT_THROW(walk_once.run(Small::texts({4}, {1}), inputs), Error);
  inputs.cancel = nullptr;
  inputs.on_scale = {};
  EXPECT_EQ(testing::max_difference(first, walk_once.run(Small::texts({4}, {1}), inputs)), 0);
}

TEST(SkipScales, AreTheCodesSoFarAtFullSize) {
  Small small;
  WalkOptions options = small.options();
  std::vector<Tensor> sums;
  options.on_codes = [&](const Tensor& summed, int) { sums.push_back(summed.to(DType::f32)); };
  walk(small.model, *small.backend, Small::texts({4}, {1}), options);
  ASSERT_EQ(sums.size(), 6U);
  options.on_codes = {};
  for (std::size_t skip = 1; skip <= 2; ++skip) {
    options.schedule = small.options().schedule;
    options.full = options.schedule.back();
    options.schedule.resize(6 - skip);
    const Tensor codes = walk(small.model, *small.backend, Small::texts({4}, {1}), options);
    EXPECT_EQ(codes.shape(), (Shape{1, 16, 12, 12}));
    EXPECT_LT(testing::max_difference(codes, sums[5 - skip]), 1e-6) << skip;
  }
}

TEST(Job, WhatTheOptionsAskFor) {
  const ModelConfig config = Small().config;
  GenerateOptions options;
  options.prompts = {"a", "b"};
  options.size = "0.25M";
  options.skip_scales = 2;
  options.uncond_until = 5;
  Job job = checked_job(config, options, 13);
  EXPECT_EQ(job.schedule.size(), 10U);
  EXPECT_EQ(job.drawn.size(), 8U);
  EXPECT_EQ(job.uncond_until, 5);
  const float cfg = config.default_cfg.at(0);
  EXPECT_EQ(job.cfg, (std::vector<float>{cfg, cfg, cfg, cfg, cfg, 1, 1, 1}));
  EXPECT_EQ(job.state_shape(2, 9, {}).full_grid(), (Grid{32, 32}));
  options.uncond_until = -1;
  options.cfg = {3, 3, 3, 1, 3, 1, 1, 1, 1, 1};
  EXPECT_EQ(checked_job(config, options, 13).uncond_until, 5) << "guidance of 1 at the end needs no other half";
  options.cfg = {1};
  EXPECT_EQ(checked_job(config, options, 13).uncond_until, 0);
  options.cfg = {1, 2};
  EXPECT_NE(complaint([&] { checked_job(config, options, 13); }).find("10"), std::string::npos);
  options.cfg = {};
  options.skip_scales = 3;
  EXPECT_NE(complaint([&] { checked_job(config, options, 13); }).find("skip-scales"), std::string::npos);
  options.skip_scales = 0;
  options.uncond_until = 11;
  EXPECT_NE(complaint([&] { checked_job(config, options, 13); }).find("uncond-until"), std::string::npos);
}

TEST(AttentionPath, SaysWhereAndWhy) {
  EXPECT_EQ(attention_path({}, 13, 8, false), "dense: asked for");
  const AttentionPlan sparse = AttentionPlan::preset("published", 8, 13);
  EXPECT_EQ(attention_path(sparse, 13, 8, false),
            "published: scales 10 to 12 sparse (cs4a, csla), the others dense, as the plan says");
  EXPECT_NE(attention_path(AttentionPlan::preset("sparvar", 8, 7), 7, 8, false).find("none of the 7 scales"),
            std::string::npos);
}

TEST(Previews, ShowThePictureOfTheScalesSoFar) {
  Pipeline pipeline = Pipeline::load({.model_dir = testing::bundled(), .precision = Precision::f32, .threads = 2});
  GenerateOptions options;
  options.prompts = {"red apple"};
  options.size = "0.06M";
  options.greedy = true;
  std::vector<int> scales;
  std::vector<Picture> previews;
  options.on_preview = [&](const Picture& picture, int scale) {
    scales.push_back(scale);
    previews.push_back(picture);
  };
  std::vector<std::size_t> previews_at_scale;
  options.on_progress = [&](const Progress& progress) {
    if (progress.stage == Progress::Stage::scale) previews_at_scale.push_back(previews.size());
  };
  const GenerateResult result = pipeline.generate(options);
  EXPECT_EQ(scales, (std::vector<int>{3, 4, 5}));
  EXPECT_EQ(result.cold_batches, 1);
  ASSERT_EQ(previews.size(), 3U);
  EXPECT_EQ(previews_at_scale, (std::vector<std::size_t>{0, 0, 0, 1, 2, 3, 3})) << "before the scale is told of";
  EXPECT_EQ(previews[2].image.width, 128);
  // The last preview is the picture without the last scale.
  options.on_preview = {};
  options.skip_scales = 1;
  EXPECT_EQ(pipeline.generate(options).pictures[0].image.rgb, previews[2].image.rgb);
  EXPECT_EQ(pipeline.generate(options).cold_batches, 0) << "this shape was drawn before";
}

}  // namespace
}  // namespace sparvar
