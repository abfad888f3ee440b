// The lists of tensors of a conversion against what the engine reads, and geometry from shapes.
#include "sparvar/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "backend/backend.h"
#include "core/e4m3.h"
#include "models/infinity/infinity.h"
#include "pipeline/convert_config.h"
#include "pipeline/convert_layout.h"
#include "pipeline/convert_writer.h"
#include "support.h"
#include "temp_folder.h"
#include "text/t5_encoder.h"
#include "visual/bsq_vae.h"
#include "weights/int8.h"

namespace sparvar {
namespace {

using testing::TempFolder;

/// Weights that remember which tensors were read.
class Remembering final : public Weights {
 public:
  explicit Remembering(const Weights& source) : source_(source) {}
  bool has(const std::string& name) const override { return source_.has(name); }
  Tensor get(const std::string& name) const override { return read_.insert(name), source_.get(name); }
  Tensor get(const std::string& name, const Shape& shape) const override {
    return read_.insert(name), source_.get(name, shape);
  }
  Tensor narrow(const std::string& name, const Shape& shape) const override {
    return narrow_.insert(name), get(name, shape);
  }
  Tensor f32(const std::string& name, const Shape& shape) const override {
    return read_.insert(name), source_.f32(name, shape);
  }
  std::int64_t bytes_of(const std::string& name) const override { return source_.bytes_of(name); }
  std::int64_t parameters() const override { return source_.parameters(); }
  const std::string& path() const override { return source_.path(); }
  const std::set<std::string>& read() const { return read_; }
  const std::set<std::string>& narrow() const { return narrow_; }

 private:
  const Weights& source_;
  mutable std::set<std::string> read_, narrow_;
};

std::set<std::string> names_of(const std::vector<WantedTensor>& layout) {
  std::set<std::string> names;
  for (const WantedTensor& tensor : layout) names.insert(tensor.name);
  EXPECT_EQ(names.size(), layout.size()) << "no tensor twice";
  return names;
}

nlohmann::json fixture(const std::string& name) {
  std::ifstream in(testing::data_dir() + "/" + name + "/config.json");
  return nlohmann::json::parse(in);
}

struct Parts {
  ConvertSource transformer, vae, text;
};

/// A model of the repository's fixtures. Its T5 has another width, so the text encoder is the bundled model's, of 256
/// channels as the fixtures have.
Parts parts(const std::string& transformer, const std::string& vae) {
  return {ConvertSource("transformer", testing::data_dir() + "/" + transformer + "/weights.safetensors", {}),
          ConvertSource("vae", testing::data_dir() + vae, {}),
          ConvertSource("text encoder", testing::models_dir() + "/emoji/text_encoder.safetensors", {})};
}

std::string text_config(const TempFolder& folder) {
  return folder.write("config.json",
                      R"({"model_type": "t5", "vocab_size": 4000, "d_model": 256, "d_kv": 64, "d_ff": 512,
    "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": true})");
}

struct Fixture {
  std::string name, vae;
};

class ConvertFixtures : public ::testing::TestWithParam<Fixture> {};

TEST_P(ConvertFixtures, GeometryIsThatOfTheFixture) {
  const TempFolder folder;
  const Parts of = parts(GetParam().name, GetParam().vae);
  const ModelConfig config = parse_model_config(
      derive_config(of.transformer, of.vae, text_config(folder), {"scales=[1,2,4]"}).dump(), "derived");
  const nlohmann::json expected = fixture(GetParam().name);
  EXPECT_EQ(config.transformer.depth, expected["depth"]);
  EXPECT_EQ(config.transformer.embed_dim, expected["embed_dim"]);
  EXPECT_EQ(config.transformer.num_heads, expected["num_heads"]);
  EXPECT_EQ(config.transformer.block_chunks, expected["block_chunks"]);
  EXPECT_EQ(config.transformer.text_channels, expected["text_channels"]);
  EXPECT_EQ(config.transformer.text_maxlen, expected["text_maxlen"]);
  EXPECT_EQ(config.transformer.mlp_ratio, expected["mlp_ratio"]);
  EXPECT_EQ(config.transformer.apply_spatial_patchify, expected["apply_spatial_patchify"] == 1);
  EXPECT_EQ(config.transformer.cos_attn, expected["cos_attn"]);
  EXPECT_EQ(config.transformer.shared_aln, expected["shared_aln"]);
  EXPECT_EQ(config.vae.codebook_dim, expected["vae"]["codebook_dim"]);
  EXPECT_EQ(config.vae.patch_size, expected["vae"]["patch_size"]);
  EXPECT_EQ(config.vae.ch, expected["vae"]["base_ch"]);
  EXPECT_EQ(config.vae.num_res_blocks, expected["vae"]["num_res_blocks"]);
}

TEST_P(ConvertFixtures, TensorsAreThoseThatTheEngineReads) {
  const TempFolder folder;
  const Parts of = parts(GetParam().name, GetParam().vae);
  const ModelConfig config = parse_model_config(
      derive_config(of.transformer, of.vae, text_config(folder), {"scales=[1,2,4]"}).dump(), "derived");
  const std::unique_ptr<Backend> backend = make_cpu_backend({.compute = DType::f32, .threads = 1});
  const Remembering transformer(of.transformer.checkpoint());
  const Infinity model(config.transformer, transformer, *backend);
  const std::vector<WantedTensor> layout = transformer_layout(config.transformer, 3, of.transformer);
  EXPECT_EQ(names_of(layout), transformer.read());
  // What is kept as fp8 is what the engine's blocks ask for as such, where the sizes allow it.
  std::set<std::string> fits, kept;
  for (const WantedTensor& wanted : layout)
    if (transformer.narrow().contains(wanted.name) && fits_e4m3(wanted.shape[0], wanted.shape[1]))
      fits.insert(wanted.name);
  for (const PlannedFile& file : plan_files("transformer", of.transformer, layout, ConvertType::fp8, 1 << 30))
    for (const PlannedTensor& tensor : file.tensors)
      if (tensor.dtype == DType::e4m3) kept.insert(tensor.name);
  EXPECT_EQ(kept, fits);
  EXPECT_EQ(kept.size(), 7U * static_cast<std::size_t>(config.transformer.depth));
  const Remembering vae(of.vae.checkpoint());
  const BsqVae decoder(config.vae, vae, *backend);
  EXPECT_EQ(names_of(vae_layout(config.vae, of.vae)), vae.read());
  const Remembering text(of.text.checkpoint());
  const T5Encoder encoder(config.text_encoder, text, *backend);
  EXPECT_EQ(names_of(text_layout(config.text_encoder, of.text)), text.read());
}

INSTANTIATE_TEST_SUITE_P(
    Models, ConvertFixtures,
    ::testing::Values(Fixture{"infinity-tiny-f16", "/bsq-vae/weights.safetensors"},
                      Fixture{"infinity-tiny-patchify", "/infinity-tiny-patchify/vae.safetensors"}),
    [](const auto& tested) { return std::string(tested.param.name == "infinity-tiny-f16" ? "f16" : "patchify"); });

TEST(Convert, AFixtureBecomesAFolderThatHoldsItsTensorsExactly) {
  namespace fs = std::filesystem;
  const TempFolder folder;
  const std::string text = folder.path("t5");
  fs::create_directory(text);
  fs::copy(text_config(folder), text + "/config.json");
  for (const char* name : {"spiece.model", "text_encoder.safetensors"})
    fs::copy(testing::models_dir() + "/emoji/" + name, text + "/" + name);
  std::int64_t last = 0;
  ConvertOptions options;
  options.transformer = testing::data_dir() + "/infinity-tiny-patchify/weights.safetensors";
  options.vae = testing::data_dir() + "/infinity-tiny-patchify/vae.safetensors";
  options.text_encoder = text;
  options.output = folder.path("made");
  options.type = ConvertType::f32;
  options.on_progress = [&](const ConvertProgress& progress) {
    EXPECT_GE(progress.bytes_done, last);
    EXPECT_LE(progress.bytes_done, progress.bytes_total);
    last = progress.bytes_done;
  };
  const ConvertResult result = convert_checkpoint(options);
  EXPECT_GT(last, 0);
  EXPECT_EQ(result.files.back().name, "config.json");
  EXPECT_EQ(read_model_config(options.output + "/config.json").transformer.bits(), 56);
  for (const auto& [stem, given] : {std::pair{"transformer", options.transformer}, {"vae", options.vae}}) {
    const TensorFile made = TensorFile::open_in(options.output, stem);
    const TensorFile expected = TensorFile::open(given);
    for (const std::string& name : made.names()) {
      EXPECT_EQ(made.get(name).dtype(), DType::f32);
      EXPECT_EQ(testing::max_difference(made.get(name), expected.get(name)), 0) << name;
    }
  }
  // The same again is refused, and goes on only where the files are asked for.
  EXPECT_THROW((void)convert_checkpoint(options), Error);
  options.resume = true;
  last = 0;
  for (const ConvertedFile& file : convert_checkpoint(options).files)
    EXPECT_EQ(file.reused, file.name != "config.json") << file.name;
}

TEST(Convert, StopsWhereItIsCancelled) {
  const TempFolder folder;
  const std::string text = folder.path("t5");
  std::filesystem::create_directory(text);
  std::filesystem::copy(text_config(folder), text + "/config.json");
  for (const char* name : {"spiece.model", "text_encoder.safetensors"})
    std::filesystem::copy(testing::models_dir() + "/emoji/" + name, text + "/" + name);
  std::atomic<bool> cancel = false;
  ConvertOptions options;
  options.transformer = testing::data_dir() + "/infinity-tiny-f16/weights.safetensors";
  options.vae = testing::data_dir() + "/bsq-vae/weights.safetensors";
  options.text_encoder = text;
  options.output = folder.path("made");
  options.cancel = &cancel;
  options.on_progress = [&](const ConvertProgress& progress) { cancel = progress.file == "vae.safetensors"; };
  try {
    (void)convert_checkpoint(options);
    FAIL() << "it was cancelled";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::cancelled);
  }
  std::vector<std::string> left;
  for (const auto& entry : std::filesystem::directory_iterator(options.output))
    left.push_back(entry.path().filename().string());
  std::sort(left.begin(), left.end());
  EXPECT_EQ(left, (std::vector<std::string>{"convert.json", "transformer.safetensors"}));
}

TEST(Convert, Int8RowsComeBackWithinHalfAScale) {
  const Tensor w = testing::random_tensor({5, 40}, 3);
  const Tensor scales = row_scales(w);
  const Tensor back = widened(narrowed(w, scales), scales);
  for (std::int64_t i = 0; i < w.size(); ++i)
    EXPECT_LE(std::abs(back.data<float>()[i] - w.data<float>()[i]), 0.5001F * scales.data<float>()[i / 40]);
  Tensor zero = Tensor::zeros(DType::f32, {1, 4});
  EXPECT_EQ(narrowed(zero, row_scales(zero)).data<std::int8_t>()[2], 0);
  zero.data<float>()[1] = NAN;
  EXPECT_FALSE(std::isfinite(row_scales(zero).data<float>()[0]));
}

}  // namespace
}  // namespace sparvar
