// The bundled model through the public interface. Pictures are small in number: each takes seconds.
#include "sparvar/pipeline.h"

#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/small_model.h"
#include "pipeline/walk.h"

namespace sparvar {
namespace {

using testing::bundled;
using testing::Small;

TEST(Walk, ABatchOfTextsOfDifferentLengthDrawsWhatEachDrawsAlone) {
  Small small;
  WalkOptions options = small.options();
  options.first_picture = 10;
  const Tensor together = walk(small.model, *small.backend, Small::texts({5, 1, 17}, {1, 2, 3}), options);
  for (int i = 0; i < 3; ++i) {
    options.first_picture = 10 + i;
    const Tensor alone = walk(small.model, *small.backend,
                              Small::texts({std::vector{5, 1, 17}[i]}, {static_cast<unsigned>(i + 1)}), options);
    EXPECT_LT(testing::max_difference(alone, together.rows(i, i + 1)), 1e-6) << "picture " << i;
  }
}

TEST(Walk, WithoutGuidanceNoUnconditionalHalfIsNeeded) {
  Small small;
  WalkOptions options = small.options();
  options.cfg.assign(6, 1.0F);
  const Tensor plain = walk(small.model, *small.backend, Small::texts({4}, {9}), options);
  // Guidance at one scale runs both halves everywhere, and changes that scale and those after it only.
  options.cfg[5] = 4.0F;
  std::vector<Tensor> before, after;
  const auto record = [](std::vector<Tensor>& into) {
    return [&into](const std::string& name, const Tensor& value) {
      if (name.starts_with("bits.")) into.push_back(value.to(DType::f32));
    };
  };
  options.observe = record(after);
  walk(small.model, *small.backend, Small::texts({4}, {9}), options);
  options.cfg[5] = 1.0F;
  options.observe = record(before);
  walk(small.model, *small.backend, Small::texts({4}, {9}), options);
  for (int k = 0; k < 5; ++k) EXPECT_EQ(testing::max_difference(before[k], after[k]), 0) << "scale " << k;
  EXPECT_GT(testing::max_difference(before[5], after[5]), 0);
  EXPECT_EQ(plain.shape(), (Shape{1, 16, 12, 12}));
}

TEST(Walk, PrunedScalesWithAllTokensKeptAreDense) {
  Small small;
  WalkOptions options = small.options();
  const Tensor dense = walk(small.model, *small.backend, Small::texts({4}, {9}), options);
  options.plan.pruning = {.first_scale = 4, .keep = {1.0}};
  EXPECT_EQ(testing::max_difference(walk(small.model, *small.backend, Small::texts({4}, {9}), options), dense), 0);
  options.plan.pruning->keep = {0.3};
  for (const int until : {5, StateShape::kAllScales}) {  // guidance may end at a pruned scale
    options.uncond_until = until;
    std::vector<double> shares;
    options.on_scale = [&](const ScaleTiming& timing, int) { shares.push_back(timing.share_of_pairs); };
    const Tensor pruned = walk(small.model, *small.backend, Small::texts({4}, {9}), options);
    EXPECT_GT(testing::max_difference(pruned, dense), 0);
    // Of 64 and 144 tokens 19 and 43 run; 57 ran before.
    EXPECT_EQ(shares[3], 1);
    EXPECT_DOUBLE_EQ(shares[4], 19.0 * (57 + 19) / (64 * (57 + 64)));
    EXPECT_DOUBLE_EQ(shares[5], 43.0 * (57 + 19 + 43) / (144 * (57 + 64 + 144)));
  }
  EXPECT_THROW(walk(small.model, *small.backend, Small::texts({4, 2}, {9, 8}), options), Error);
}

TEST(Walk, TheOutputOfTheScaleBeforeStandsForTokensThatDidNotRun) {
  // Where one token of a scale runs, all others' logits are those of the scale before, resized: on a 1x1 scale before
  // they are all the same.
  Small small;
  WalkOptions options = small.options();
  options.schedule = {{1, 1}, {3, 4}};
  options.cfg.assign(2, 1.0F);
  options.tau.assign(2, 1.0F);
  options.plan.pruning = {.first_scale = 1, .keep = {0.01}};
  Tensor before, after;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name == "logits_cond.s0") before = value.to(DType::f32);
    if (name == "logits_cond.s1") after = value.to(DType::f32);
  };
  walk(small.model, *small.backend, Small::texts({4}, {9}), options);
  ASSERT_EQ(after.dim(1), 12);
  int same = 0;
  for (int i = 0; i < 12; ++i) {
    double difference = 0;
    for (std::int64_t c = 0; c < after.dim(2); ++c)
      difference = std::max(difference, std::abs(static_cast<double>(after.data<float>()[i * after.dim(2) + c]) -
                                                 before.data<float>()[c]));
    same += difference < 1e-4 ? 1 : 0;
  }
  EXPECT_EQ(same, 11);
}

TEST(Walk, GridsNeedNotBeSquare) {
  Small small;
  WalkOptions options = small.options();
  options.schedule = {{1, 1}, {2, 3}, {5, 4}, {6, 10}, {9, 16}, {11, 20}};
  options.rope_grid = {44, 80};
  EXPECT_EQ(walk(small.model, *small.backend, Small::texts({3}, {4}), options).shape(), (Shape{1, 16, 11, 20}));
}

TEST(Walk, StopsWhenCancelled) {
  Small small;
  WalkOptions options = small.options();
  std::atomic<bool> cancel{false};
  options.cancel = &cancel;
  options.on_scale = [&](const ScaleTiming&, int k) { cancel = k == 2; };
  try {
    walk(small.model, *small.backend, Small::texts({3}, {4}), options);
    FAIL() << "went on";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::cancelled);
  }
}

TEST(Walk, GuidanceOnALayerIsNotGuidanceOnLogits) {
  Small small;
  small.config.transformer.cfg_insertion_layer = {-2};
  Infinity layered(small.config.transformer, small.weights, *small.backend);
  WalkOptions options = small.options();
  std::vector<Tensor> hidden;
  options.observe = [&](const std::string& name, const Tensor& value) {
    if (name == "hidden.s3.b6") hidden.push_back(value.to(DType::f32));
  };
  walk(layered, *small.backend, Small::texts({3}, {4}), options);
  ASSERT_EQ(hidden.size(), 1U);
  EXPECT_EQ(testing::max_difference(hidden[0].rows(0, 1), hidden[0].rows(1, 2)), 0)
      << "both halves hold the guided state after layer 6 of 8";
}

TEST(Pipeline, RefusesImpossibleOptions) {
  Pipeline pipeline = Pipeline::load({.model_dir = bundled(), .precision = Precision::bf16, .threads = 2});
  EXPECT_EQ(pipeline.info().schedule.size(), 13U);
  EXPECT_EQ(pipeline.info().picture_width, 512);
  const auto refused = [&](const std::function<void(GenerateOptions&)>& change, const char* word) {
    GenerateOptions options;
    options.prompts = {"cat"};
    change(options);
    try {
      pipeline.generate(options);
      ADD_FAILURE() << word << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::usage);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  refused([](GenerateOptions& o) { o.prompts.clear(); }, "prompt");
  refused([](GenerateOptions& o) { o.prompts = {"\xff"}; }, "UTF-8");
  refused([](GenerateOptions& o) { o.pictures_per_prompt = 0; }, "pictures");
  refused([](GenerateOptions& o) { o.cfg = {NAN}; }, "cfg");
  refused([](GenerateOptions& o) { o.cfg = {1, 2}; }, "cfg");
  refused([](GenerateOptions& o) { o.tau = {0}; }, "tau");
  refused([](GenerateOptions& o) { o.top_p = 1.5F; }, "top-p");
  refused([](GenerateOptions& o) { o.top_k = -1; }, "top-k");
  refused([](GenerateOptions& o) { o.plan.rules = {{0, -1, 10, -1, ProbeAttention{.stride = 0}}}; }, "stride");
}

TEST(Pipeline, MissingModelNamesTheFolder) {
  try {
    Pipeline::load({.model_dir = "/nowhere/model"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_NE(std::string(error.what()).find("/nowhere/model"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace sparvar
