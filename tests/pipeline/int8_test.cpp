// A model whose matrices are kept in eight bits draws nearly the same pictures, from a file of half the size.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>  // mkdtemp

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "pipeline/small_model.h"
#include "sparvar/pipeline.h"

namespace sparvar {
namespace {

namespace fs = std::filesystem;

struct Folder {
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "sparvar-int8-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path = pattern;
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  fs::path path;
};

/// The file with matrices and filters of 1024 numbers or more in eight bits (or `widened`: as the f32 numbers that
/// those stand for), everything else as it is.
void write_int8(const TensorFile& file, const fs::path& path, bool widened) {
  std::string header = "{", data;
  const auto put = [&](const std::string& name, const Tensor& tensor) {
    const std::size_t begin = data.size();
    data.append(static_cast<const char*>(tensor.raw()), tensor.bytes());
    header += fmt::format(R"({}"{}":{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", header.size() > 1 ? "," : "",
                          name, name_of(tensor.dtype()), to_string(tensor.shape()), begin, data.size());
  };
  for (const std::string& name : file.names()) {
    const Tensor stored = file.get(name);
    if (stored.rank() < 2 || stored.size() < 1024 || stored.dim(0) < 8) {
      put(name, stored);
      continue;
    }
    const Tensor w = stored.to(DType::f32);
    Tensor q = Tensor::empty(DType::i8, w.shape()), scale = Tensor::empty(DType::f32, {w.dim(0)});
    const std::int64_t each = w.size() / w.dim(0);
    for (std::int64_t o = 0; o < w.dim(0); ++o) {
      const float* row = w.data<float>() + o * each;
      float largest = 1e-12F;
      for (std::int64_t i = 0; i < each; ++i) largest = std::max(largest, std::abs(row[i]));
      scale.data<float>()[o] = largest / 127;
      for (std::int64_t i = 0; i < each; ++i)
        q.data<std::int8_t>()[o * each + i] = static_cast<std::int8_t>(std::lround(row[i] / scale.data<float>()[o]));
    }
    if (widened) {
      Tensor back = Tensor::empty(DType::f32, w.shape());
      for (std::int64_t i = 0; i < w.size(); ++i)
        back.data<float>()[i] = scale.data<float>()[i / each] * static_cast<float>(q.data<std::int8_t>()[i]);
      put(name, back);
      continue;
    }
    put(name, q);
    put(name + ".scale", scale);
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << header << data;
}

TEST(Int8, AModelOfHalfTheSizeDrawsWhatItsNumbersDraw) {
  const Folder folder;
  const fs::path model = testing::bundled();
  std::int64_t before = 0, after = 0;
  for (const bool widened : {false, true}) {
    const fs::path to = folder.path / (widened ? "widened" : "eight");
    fs::create_directories(to);
    for (const char* name : {"config.json", "spiece.model"}) fs::copy_file(model / name, to / name);
    for (const char* stem : {"transformer", "vae", "text_encoder"}) {
      const std::string name = std::string(stem) + ".safetensors";
      write_int8(TensorFile::open((model / name).string()), to / name, widened);
      if (widened) continue;
      before += static_cast<std::int64_t>(fs::file_size(model / name));
      after += static_cast<std::int64_t>(fs::file_size(to / name));
    }
  }
  EXPECT_LT(after, 0.56 * static_cast<double>(before));

  GenerateOptions options;
  options.prompts = {"red heart, noto style"};
  options.size = "0.06M";
  options.seed = 3;
  const auto draw = [&](const fs::path& dir, std::int64_t& parameters) {
    Pipeline pipeline = Pipeline::load({.model_dir = dir.string(), .device = "cpu"});
    const ModelInfo& info = pipeline.info();
    parameters = info.transformer_parameters + info.vae_parameters + info.text_parameters;
    return pipeline.generate(options).pictures.at(0).image;
  };
  std::int64_t whole = 0, eight = 0;
  const Image plain = draw(folder.path / "widened", whole);
  EXPECT_EQ(plain.rgb, draw(folder.path / "eight", eight).rgb);
  EXPECT_EQ(whole, eight);
  EXPECT_NE(plain.rgb, draw(model, whole).rgb) << "eight bits are not sixteen";
}

}  // namespace
}  // namespace sparvar
