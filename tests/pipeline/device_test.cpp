// Whole pictures on the device under test (SPARVAR_TEST_DEVICE): batches, and pictures one after the other.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "backend/device_under_test.h"
#include "pipeline/session.h"
#include "sparvar/error.h"
#include "sparvar/pipeline.h"
#include "support.h"
#include "temp_folder.h"
#include "text/t5_encoder.h"
#include "weights/safetensors.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

std::string bundled() { return testing::models_dir() + "/emoji"; }

/// The bundled model on its first seven scales: pictures of 128 x 128.
class SmallModel {
 public:
  SmallModel() {
    for (const char* file : {"spiece.model", "text_encoder.safetensors", "transformer.safetensors", "vae.safetensors"})
      fs::create_symlink(fs::absolute(bundled() + "/" + file), folder_.path(file));
    nlohmann::json config = nlohmann::json::parse(std::ifstream(bundled() + "/config.json"));
    config["scales"] = {1, 2, 4, 6, 8, 12, 16};
    folder_.write("config.json", config.dump());
  }
  Pipeline load(Precision precision) const {
    return Pipeline::load({.model_dir = folder_.path(),
                           .precision = precision,
                           .threads = 2,
                           .device = testing::on_gpu() ? "cuda" : "cpu"});
  }

 private:
  testing::TempFolder folder_;
};

/// The device under test itself, without HostSide.
std::unique_ptr<Backend> device(DType compute) {
  if (!testing::on_gpu()) return make_cpu_backend({.compute = compute, .threads = 2});
  return testing::make_gpu({.compute = compute});
}

const std::vector<std::string> kPrompts = {"red apple, 3d style",
                                           "cat",
                                           "a very long description of a face that grins from ear to ear, noto style",
                                           "sun",
                                           "two words",
                                           "dog",
                                           "blue heart, twitter style",
                                           "x"};

GenerateOptions greedy(std::vector<std::string> prompts, int batch) {
  GenerateOptions options;
  options.prompts = std::move(prompts);
  options.batch = batch;
  options.greedy = true;  // no draw that a last bit could turn
  return options;
}

/// Batches of 8, 4, 2 and 1. A batch multiplies other shapes than one picture does, and sums in another order where
/// another algorithm is the fastest for them: a bit at a tie may turn, and the picture behind it. Which bits may is
/// what ABatchDrawsTheBitsOfEachPicture looks at; here pictures must be the same to the eye (they are equal on the
/// CPU).
TEST(Device, BatchesOfPromptsOfDifferentLengthDrawWhatEachDrawsAlone) {
  const SmallModel model;
  Pipeline pipeline = model.load(Precision::f32);
  std::vector<std::string> prompts = kPrompts;
  if (!testing::on_gpu()) prompts.resize(2);  // seconds each; Walk's own test has more
  std::vector<Image> alone;
  alone.reserve(prompts.size());
  for (const std::string& prompt : prompts) alone.push_back(pipeline.generate(greedy({prompt}, 1)).pictures[0].image);
  for (int batch = static_cast<int>(prompts.size()); batch > 0; batch /= 2) {
    const GenerateResult together = pipeline.generate(greedy(prompts, batch));
    ASSERT_EQ(together.pictures.size(), prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const Image& image = together.pictures[i].image;
      EXPECT_GT(psnr(image, alone[i]), 50) << "batch " << batch << ", " << prompts[i];
      EXPECT_TRUE(testing::on_gpu() || image.rgb == alone[i].rgb) << "batch " << batch << ", " << prompts[i];
    }
  }
}

TEST(Device, TheSeedAloneDecidesThePicture) {
  const SmallModel model;
  GenerateOptions options;
  options.prompts = {"red apple, 3d style"};
  options.seed = 3;
  std::vector<Image> pictures;
  for (int load = 0; load < 2; ++load) {  // what is measured at load time must not show
    Pipeline pipeline = model.load(Precision::bf16);
    for (int run = 0; run < (testing::on_gpu() ? 3 : 1); ++run)
      pictures.push_back(pipeline.generate(options).pictures[0].image);
  }
  for (const Image& picture : pictures) EXPECT_EQ(picture.rgb, pictures[0].rgb);
}

TEST(Device, EveryPlanDrawsOnTheGpuWhatItDrawsOnTheCpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "compares a GPU with the CPU";
  const auto load = [](const char* device) {
    return Pipeline::load({.model_dir = bundled(), .precision = Precision::f32, .threads = 0, .device = device});
  };
  Pipeline gpu = load("cuda");
  Pipeline cpu = load("cpu");
  for (const std::string& plan : AttentionPlan::preset_names()) {
    GenerateOptions options = greedy({"red apple, 3d style"}, 1);
    options.plan = AttentionPlan::preset(plan, 8, 13);
    if (options.plan.pruning) continue;  // runs on the CPU only
    const GenerateResult there = gpu.generate(options);
    const GenerateResult here = cpu.generate(options);
    EXPECT_GT(psnr(there.pictures[0].image, here.pictures[0].image), 40) << plan;
    for (std::size_t k = 0; k < here.scales.size(); ++k)
      EXPECT_NEAR(there.scales[k].share_of_pairs, here.scales[k].share_of_pairs, 1e-3) << plan << ", scale " << k;
  }
}

TEST(Device, AnotherPromptIsNotRecordedAgain) {
  if (!testing::on_gpu()) GTEST_SKIP() << "the CPU records nothing";
  const SmallModel model;
  Pipeline pipeline = model.load(Precision::bf16);
  GenerateOptions options;
  options.prompts = {"red apple, 3d style"};
  const GenerateResult first = pipeline.generate(options);
  const auto scales = static_cast<int>(pipeline.info().schedule.size());
  EXPECT_EQ(first.recordings, scales + 3) << "scales, text encoder, the text's keys and values, decoder";
  options.prompts = {"a very long description of a face that grins from ear to ear, noto style"};
  options.seed = 9;
  options.cfg = {2.5F};
  options.tau = {0.6F};
  options.top_p = 0.9F;
  const GenerateResult second = pipeline.generate(options);
  EXPECT_EQ(second.recordings, 0);
  EXPECT_NE(second.pictures[0].image.rgb, first.pictures[0].image.rgb);
  options.prompts = {"sun", "dog", "two words"};  // one after the other
  options.batch = 1;
  EXPECT_EQ(pipeline.generate(options).recordings, 0);
  options.batch = 3;  // another shape: it is recorded, and seen
  EXPECT_EQ(pipeline.generate(options).recordings, scales + 2);
}

TEST(Device, TheTextEncoderIsRecordedOncePerLength) {
  if (!testing::on_gpu()) GTEST_SKIP() << "the CPU records nothing";
  const auto backend = device(DType::bf16);
  const ModelConfig config = read_model_config(bundled() + "/config.json");
  const TensorFile file = TensorFile::open_in(bundled(), "text_encoder");
  T5Encoder encoder(config.text_encoder, file, *backend);
  const auto encoded = [&](int tokens) {
    std::vector<std::int32_t> ids;
    ids.reserve(tokens);
    for (int i = 0; i < tokens; ++i) ids.push_back(3 + 7 * i % 90);
    return encoder.encode(ids);
  };
  const int step = backend->length_step();
  const Tensor first = encoded(5);
  EXPECT_EQ(backend->recordings(), 1);
  EXPECT_EQ(encoded(step).dim(0), step);
  EXPECT_EQ(backend->recordings(), 1) << "lengths up to " << step << " share a program";
  encoded(step + 1);
  EXPECT_EQ(backend->recordings(), 2);
  EXPECT_EQ(testing::max_difference(encoded(5), first), 0) << "a replay is what was recorded";
  EXPECT_EQ(backend->recordings(), 2);
}

TEST(Device, WhatChangesFromPictureToPictureIsAnInput) {
  if (!testing::on_gpu()) GTEST_SKIP() << "the CPU records nothing";
  const auto backend = device(DType::bf16);
  const ModelConfig config = read_model_config(bundled() + "/config.json");
  const TensorFile transformer_file = TensorFile::open_in(bundled(), "transformer");
  const TensorFile vae_file = TensorFile::open_in(bundled(), "vae");
  Infinity transformer(config.transformer, transformer_file, *backend);
  BsqVae vae(config.vae, vae_file, *backend);
  const StateShape shape{.pictures = 1,
                         .guided = true,
                         .schedule = config.schedule,
                         .rope_grid = config.rope_grid,
                         .plan = {},
                         .text_tokens = 64,
                         .longest_text = 64};
  backend->reserve([&] { Session(transformer, vae, *backend, shape).run_programs(); });
  Session session(transformer, vae, *backend, shape);
  const auto draw = [&](int tokens, unsigned seed, float cfg) {
    PackedText text;
    text.states = testing::random_tensor({tokens, config.transformer.text_channels}, seed);
    text.offsets.push_back(tokens);
    WalkInputs inputs;
    inputs.cfg.assign(config.schedule.size(), cfg);
    inputs.tau.assign(config.schedule.size(), 0.7F);
    inputs.sampling.seed = seed;
    return backend->download(session.decode(session.walk().run(text, inputs), 0));
  };
  const Tensor first = draw(9, 1, 3.0F);
  const int recorded = backend->recordings();
  EXPECT_EQ(recorded, static_cast<int>(config.schedule.size()) + 2);  // scales, text, decoder
  const Tensor second = draw(30, 2, 4.0F);
  EXPECT_EQ(backend->recordings(), recorded);
  EXPECT_GT(testing::max_difference(first.to(DType::f32), second.to(DType::f32)), 0);
}

}  // namespace
}  // namespace sparvar
