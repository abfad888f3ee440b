// Whole pictures on the device under test (SPARVAR_TEST_DEVICE): batches, and pictures one after the other.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "backend/device_under_test.h"
#include "pipeline/session.h"
#include "sparvar/pipeline.h"
#include "support.h"
#include "weights/safetensors.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

std::string bundled() { return testing::models_dir() + "/emoji-v0"; }

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

TEST(Device, BatchesOfPromptsOfDifferentLengthDrawWhatEachDrawsAlone) {
  const SmallModel model;
  Pipeline pipeline = model.load(Precision::f32);
  std::vector<std::string> prompts = kPrompts;
  if (!testing::on_gpu()) prompts.resize(2);  // seconds each; Walk's own test has more
  std::vector<Image> alone;
  for (const std::string& prompt : prompts) alone.push_back(pipeline.generate(greedy({prompt}, 1)).pictures[0].image);
  for (int batch = static_cast<int>(prompts.size()); batch > 0; batch /= 2) {
    const GenerateResult together = pipeline.generate(greedy(prompts, batch));
    ASSERT_EQ(together.pictures.size(), prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i)
      EXPECT_GT(psnr(together.pictures[i].image, alone[i]), 50) << "batch " << batch << ", " << prompts[i];
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

TEST(Device, AnotherPromptIsNotRecordedAgain) {
  if (!testing::on_gpu()) GTEST_SKIP() << "the CPU records nothing";
  std::string why;
  const auto backend = make_cuda_backend({.compute = DType::bf16, .device = 0, .planning = false}, why);
  ASSERT_NE(backend, nullptr) << why;
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
