// A model folder of fp8 weights, as `convert --dtype fp8` writes it: the bits of load-time quantisation, and what it
// draws on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/e4m3.h"
#include "pipeline/device.h"
#include "pipeline/small_model.h"
#include "sparvar/convert.h"
#include "sparvar/pipeline.h"
#include "temp_folder.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;
using testing::TempFolder;

/// The bundled model, converted from its own safetensors files.
std::string converted(const TempFolder& folder, const std::string& name, ConvertType type,
                      const std::string& transformer = testing::bundled() + "/transformer.safetensors") {
  std::ifstream in(testing::bundled() + "/config.json");
  const nlohmann::json config = nlohmann::json::parse(in);
  nlohmann::json text = config["text_encoder"];
  text.erase("type");
  text["model_type"] = "t5";
  const std::string t5 = folder.path("t5");
  fs::create_directories(t5);
  std::ofstream(t5 + "/config.json") << text.dump();
  for (const char* file : {"spiece.model", "text_encoder.safetensors"})
    fs::copy_file(testing::bundled() + "/" + file, t5 + "/" + file, fs::copy_options::skip_existing);
  ConvertOptions options;
  options.transformer = transformer;
  options.vae = testing::bundled() + "/vae.safetensors";
  options.text_encoder = t5;
  options.output = folder.path(name);
  options.type = type;
  options.set = {"scales=" + config["scales"].dump(), "vae.norm_num_groups=8", "defaults.tau=0.7"};
  return convert_checkpoint(options).folder;
}

std::int64_t bytes_of(const std::string& folder) {
  return static_cast<std::int64_t>(fs::file_size(folder + "/transformer.safetensors"));
}

TEST(Fp8Folder, HoldsTheBitsOfLoadTimeQuantisation) {
  const TempFolder folder;
  const std::string narrow = converted(folder, "fp8", ConvertType::fp8),
                    plain = converted(folder, "bf16", ConvertType::bf16);
  const TensorFile kept = TensorFile::open_in(narrow, "transformer"), given = TensorFile::open_in(plain, "transformer");
  int matrices = 0;
  for (const std::string& name : given.names()) {
    const Tensor bf16 = given.get(name);
    if (!kept.has(name + ".scale")) {
      EXPECT_EQ(testing::max_difference(kept.get(name), bf16), 0) << name;
      EXPECT_EQ(kept.get(name).dtype(), bf16.dtype()) << name;
      continue;
    }
    ++matrices;
    const Tensor found = kept.narrow(name, bf16.shape()), expected = e4m3_rows(bf16);
    ASSERT_EQ(found.dtype(), DType::e4m3);
    EXPECT_EQ(std::memcmp(found.raw(), expected.raw(), storage_bytes(DType::e4m3, bf16.shape())), 0) << name;
  }
  EXPECT_EQ(matrices, 7 * testing::Small().config.transformer.depth);
  EXPECT_EQ(kept.parameters(), given.parameters());
  EXPECT_LT(bytes_of(narrow), 0.62 * static_cast<double>(bytes_of(plain)));
  for (const char* file : {"vae.safetensors", "text_encoder.safetensors"}) {
    const TensorFile a = TensorFile::open(narrow + "/" + file), b = TensorFile::open(plain + "/" + file);
    EXPECT_EQ(a.bytes(), b.bytes()) << file;
  }
  // An f32 checkpoint goes by way of bf16: the same bits.
  const std::string wide = converted(folder, "f32", ConvertType::f32);
  const std::string again = converted(folder, "fp8-of-f32", ConvertType::fp8, wide + "/transformer.safetensors");
  const TensorFile other = TensorFile::open_in(again, "transformer");
  for (const std::string& name : kept.names())
    if (kept.has(name + ".scale")) {
      EXPECT_EQ(testing::max_difference(other.narrow(name, other.get(name).shape()), kept.get(name)), 0) << name;
    }
}

TEST(Fp8Folder, DrawsOnTheCpuNearlyWhatBf16Draws) {
  const TempFolder folder;
  testing::Small small;
  const TensorFile narrow = TensorFile::open_in(converted(folder, "fp8", ConvertType::fp8), "transformer");
  Infinity model(small.config.transformer, narrow, *small.backend);
  const PackedText text = testing::Small::texts({9}, {4});
  std::vector<Tensor> bits, found;
  WalkOptions options = small.options();
  options.sampling.greedy = true;
  const auto collect = [&](std::vector<Tensor>& into) {
    options.observe = [&into](const std::string& name, const Tensor& value) {
      if (name.starts_with("bits.")) into.push_back(value.to(value.dtype()));
    };
  };
  collect(bits);
  (void)walk(small.model, *small.backend, text, options);
  options.forced_bits = [&](int k) { return bits[static_cast<std::size_t>(k)]; };
  collect(found);
  (void)walk(model, *small.backend, text, options);
  ASSERT_EQ(found.size(), bits.size());
  std::int64_t equal = 0, total = 0;
  for (std::size_t k = 0; k < bits.size(); ++k) {
    total += bits[k].size();
    for (std::int64_t i = 0; i < bits[k].size(); ++i)
      equal += bits[k].data<std::uint8_t>()[i] == found[k].data<std::uint8_t>()[i] ? 1 : 0;
  }
  const double share = static_cast<double>(equal) / static_cast<double>(total);
  RecordProperty("equal_bits", std::to_string(share));
  EXPECT_GT(share, 0.94) << "what docs/cuda.md asks of fp8 on a GPU";
  EXPECT_LT(share, 1) << "nothing was fp8";
}

TEST(Fp8Folder, ThePipelineWidensItWhereNoDeviceMultipliesFp8) {
  const TempFolder folder;
  const std::string narrow = converted(folder, "fp8", ConvertType::fp8);
  // The numbers that it stands for, as f32.
  const std::string wide = folder.path("wide");
  fs::copy(narrow, wide);
  const TensorFile kept = TensorFile::open_in(narrow, "transformer");
  std::string header = "{", data;
  for (const std::string& name : kept.names()) {
    if (name.ends_with(".scale") && kept.has(name.substr(0, name.size() - 6))) continue;
    const Tensor tensor = kept.get(name);
    header += (data.empty() ? "\"" : ",\"") + name + R"(":{"dtype":")" + name_of(tensor.dtype()) + R"(","shape":)" +
              to_string(tensor.shape()) + ",\"data_offsets\":[" + std::to_string(data.size()) + ",";
    data.append(static_cast<const char*>(tensor.raw()), tensor.bytes());
    header += std::to_string(data.size()) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  fs::remove(wide + "/transformer.safetensors");
  (void)folder.write("wide/transformer.safetensors", file + header + data);

  GenerateOptions options;
  options.prompts = {"red heart, noto style"};
  options.size = "0.06M";
  options.seed = 3;
  const auto draw = [&](const std::string& dir, WeightFormat weights) {
    Pipeline pipeline = Pipeline::load({.model_dir = dir, .device = "cpu", .weights = weights});
    EXPECT_EQ(pipeline.info().weights, WeightFormat::plain);
    return pipeline.generate(options).pictures.at(0).image;
  };
  const Image expected = draw(wide, WeightFormat::as_stored);
  EXPECT_EQ(draw(narrow, WeightFormat::as_stored).rgb, expected.rgb);
  EXPECT_EQ(draw(narrow, WeightFormat::plain).rgb, expected.rgb);
  EXPECT_NE(draw(testing::bundled(), WeightFormat::as_stored).rgb, expected.rgb) << "8 bits are not 16";
  EXPECT_THROW((void)draw(narrow, WeightFormat::fp8), Error) << "asked for by name, the CPU has none";
}

TEST(Fp8Folder, WhatIsAutomaticFollowsTheFolderAndTheDevice) {
  PipelineOptions options;
  options.device = "cpu";
  EXPECT_EQ(weights_for(options, true), WeightFormat::plain);
  options.device = "auto";
  options.precision = Precision::f32;
  EXPECT_EQ(weights_for(options, true), WeightFormat::plain);
  options.precision = Precision::bf16;
  EXPECT_EQ(weights_for(options, false), WeightFormat::plain);
  std::string why;
  const bool able =
      make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = true}, why) != nullptr;
  EXPECT_EQ(weights_for(options, true), able ? WeightFormat::fp8 : WeightFormat::plain);
  options.weights = WeightFormat::fp8;
  EXPECT_EQ(weights_for(options, false), WeightFormat::fp8);
}

/// On Hopper: loaded as it is kept, the folder draws what bf16 weights made fp8 while they are loaded draw.
TEST(Device, AnFp8FolderDrawsThePictureOfFp8Weights) {
  std::string why;
  if (!make_cuda_backend({.compute = DType::bf16, .device = 0, .fp8 = true, .planning = true}, why))
    GTEST_SKIP() << why;
  const TempFolder folder;
  GenerateOptions options;
  options.prompts = {"red apple, 3d style"};
  options.seed = 3;
  options.size = "0.25M";
  const auto draw = [&](const std::string& dir, WeightFormat weights) {
    Pipeline pipeline = Pipeline::load({.model_dir = dir, .device = "cuda", .weights = weights});
    EXPECT_EQ(pipeline.info().weights, WeightFormat::fp8);
    return pipeline.generate(options).pictures.at(0).image;
  };
  const Image expected = draw(converted(folder, "bf16", ConvertType::bf16), WeightFormat::fp8);
  EXPECT_EQ(draw(converted(folder, "fp8", ConvertType::fp8), WeightFormat::as_stored).rgb, expected.rgb);
}

}  // namespace
}  // namespace sparvar
