// A model whose texts are folded against the same one whose are not, on a GPU (SPARVAR_TEST_DEVICE=cuda).
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "backend/device_under_test.h"
#include "models/random_weights.h"
#include "pipeline/walk.h"
#include "support.h"

namespace sparvar {
namespace {

ModelConfig wide_model() {
  ModelConfig config;
  config.transformer = {.depth = 3, .embed_dim = 1024, .num_heads = 8, .text_channels = 1024, .codebook_dim = 16};
  config.vae.codebook_dim = 16;
  config.schedule = {{1, 1}, {4, 4}, {16, 16}, {23, 24}};
  config.rope_grid = {23, 24};
  return config;
}

/// Texts of 21 tokens at most.
PackedText texts() {
  PackedText text;
  text.offsets = {0, 21};
  text.states = testing::random_tensor({21, 1024}, 7, 0.3F);
  return text;
}

struct Drawn {
  std::map<std::string, Tensor> logits;
  Tensor codes;
};

/// Every scale follows random bits. Watched, it runs operation by operation; if not, as recorded programs, whose codes
/// are returned.
Drawn run(bool folds, bool watched, int uncond_until) {
  CudaOptions options;
  options.older.text = !folds;
  const auto device = testing::make_gpu(options);
  const ModelConfig config = wide_model();
  const RandomWeights weights(config, *device);
  Infinity model(config.transformer, weights, *device);
  const StateShape shape{.pictures = 1,
                         .guided = true,
                         .uncond_until = uncond_until,
                         .schedule = config.schedule,
                         .rope_grid = config.rope_grid,
                         .plan = {},
                         .text_tokens = 24,
                         .longest_text = 24};
  EXPECT_EQ(model.folded_rows(shape) > 0, folds);
  WalkInputs inputs;
  inputs.cfg.assign(config.schedule.size(), 3.0F);
  inputs.tau.assign(config.schedule.size(), 1.0F);
  WalkWatch watch;
  Drawn out;
  if (watched) {
    watch.observe = [&](const std::string& name, const Tensor& value) {
      if (name.starts_with("logits_cfg.")) out.logits[name] = value.to(DType::f32);
    };
    watch.forced_bits = [&](int k) {
      const Tensor random = testing::random_tensor({1, config.schedule[k].tokens(), 16}, 11 + k);
      Tensor bits = Tensor::empty(DType::u8, random.shape());
      for (std::int64_t i = 0; i < bits.size(); ++i) bits.data<std::uint8_t>()[i] = random.data<float>()[i] > 0 ? 1 : 0;
      return bits;
    };
  }
  device->reserve([&] { Walk(model, *device, shape).run_programs(); });
  Walk walk(model, *device, shape);
  for (int i = 0; i < 2; ++i) out.codes = device->download(walk.run(texts(), inputs, watch));  // the second is replayed
  return out;
}

double relative_difference(const Tensor& a, const Tensor& b) {
  double off = 0, size = 0;
  for (std::int64_t i = 0; i < a.size(); ++i) {
    const double x = a.data<float>()[i], y = b.data<float>()[i];
    off += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(off / size);
}

TEST(FoldedModel, HasTheLogitsOfOneThatIsNot) {
  if (!testing::on_gpu()) GTEST_SKIP() << "texts are folded on a GPU";
  for (const int uncond_until : {StateShape::kAllScales, 3}) {
    const Drawn folded = run(true, true, uncond_until), plain = run(false, true, uncond_until);
    ASSERT_EQ(folded.logits.size(), 4U);
    for (const auto& [name, logits] : folded.logits) {
      const double off = relative_difference(logits, plain.logits.at(name));
      const bool small = name == "logits_cfg.s0" || name == "logits_cfg.s1";
      EXPECT_LT(off, 0.02) << name;  // three layers of bf16
      EXPECT_EQ(off == 0, small) << name << ": large scales alone are folded";
    }
  }
}

TEST(FoldedModel, ReplaysWhatItRecorded) {
  if (!testing::on_gpu()) GTEST_SKIP() << "texts are folded on a GPU";
  const Drawn once = run(true, false, StateShape::kAllScales), again = run(true, false, StateShape::kAllScales);
  EXPECT_EQ(testing::max_difference(once.codes, again.codes), 0);
  EXPECT_GT(testing::max_difference(once.codes, Tensor::zeros(DType::f32, once.codes.shape())), 0);
}

}  // namespace
}  // namespace sparvar
