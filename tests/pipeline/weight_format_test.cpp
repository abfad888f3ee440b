// fp8 weights: where they are refused, and what they draw (SPARVAR_TEST_DEVICE=cuda, on Hopper).
#include <gtest/gtest.h>

#include "backend/device_under_test.h"
#include "pipeline/device.h"
#include "sparvar/pipeline.h"
#include "support.h"

namespace sparvar {
namespace {

PipelineOptions options_of(const std::string& device, WeightFormat weights, Precision precision = Precision::bf16) {
  PipelineOptions options;
  options.model_dir = testing::models_dir() + "/emoji";
  options.precision = precision;
  options.threads = 2;
  options.device = device;
  options.weights = weights;
  return options;
}

std::string refusal(const PipelineOptions& options, ErrorKind kind) {
  try {
    open_device(options);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind);
    return error.what();
  }
  return {};
}

TEST(WeightFormats, Fp8IsRefusedInOneLineWhereItCannotBe) {
  EXPECT_NE(refusal(options_of("cpu", WeightFormat::fp8), ErrorKind::usage).find("Hopper"), std::string::npos);
  EXPECT_NE(refusal(options_of("auto", WeightFormat::fp8, Precision::f32), ErrorKind::usage).find("--dtype bf16"),
            std::string::npos);
  EXPECT_EQ(refusal(options_of("cpu", WeightFormat::plain, Precision::f32), ErrorKind::usage), "");
  std::string why;
  if (make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = true, .hopper = true}, why))
    return;
  EXPECT_NE(refusal(options_of("auto", WeightFormat::fp8), ErrorKind::system).find(why), std::string::npos);
  EXPECT_NE(refusal(options_of("cuda", WeightFormat::fp8), ErrorKind::system).find(why), std::string::npos);
}

TEST(Device, Fp8WeightsDrawTheSamePictureAtEveryLoad) {
  std::string why;
  if (!testing::on_gpu()) GTEST_SKIP() << "the CPU has no fp8 layers";
  if (!make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = true, .hopper = true}, why))
    GTEST_SKIP() << why;
  GenerateOptions options;
  options.prompts = {"red apple, 3d style"};
  options.seed = 3;
  options.size = "0.25M";
  std::vector<Image> pictures;
  for (int load = 0; load < 2; ++load) {
    Pipeline pipeline = Pipeline::load(options_of("cuda", WeightFormat::fp8));
    EXPECT_NE(pipeline.info().backend.find("fp8"), std::string::npos);
    for (int run = 0; run < 2; ++run) pictures.push_back(pipeline.generate(options).pictures[0].image);
  }
  for (const Image& picture : pictures) EXPECT_EQ(picture.rgb, pictures[0].rgb);
  Pipeline plain = Pipeline::load(options_of("cuda", WeightFormat::plain));
  const Image expected = plain.generate(options).pictures[0].image;
  EXPECT_NE(pictures[0].rgb, expected.rgb) << "nothing was fp8";
  EXPECT_GT(psnr(pictures[0], expected), 8) << "not of the same kind";  // other bits draw another apple
}

}  // namespace
}  // namespace sparvar
