// Fixture folders as the tests of this room see them.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "support.h"
#include "weights/config.h"
#include "weights/safetensors.h"

namespace sparvar::testing {

struct Fixture {
  explicit Fixture(const std::string& name) : dir(data_dir() + "/" + name), json(read(dir + "/config.json")) {}

  TensorFile open(const std::string& file) const { return TensorFile::open(dir + "/" + file); }

  VaeConfig vae() const {
    const nlohmann::json& from = json.at("vae");
    VaeConfig config;
    config.codebook_dim = from.at("codebook_dim");
    config.patch_size = from.at("patch_size");
    config.ch = from.at("base_ch");
    config.ch_mult = from.at("ch_mult").get<std::vector<int>>();
    config.num_res_blocks = from.at("num_res_blocks");
    config.norm_num_groups = from.at("group_norm_groups");
    config.norm_eps = from.at("group_norm_eps");
    return config;
  }

  ScaleSchedule schedule() const {
    ScaleSchedule grids;
    for (const auto& scale : json.at("scale_schedule")) grids.push_back({scale.at(1), scale.at(2)});
    return grids;
  }

  std::string dir;
  nlohmann::json json;

 private:
  static nlohmann::json read(const std::string& path) {
    std::ifstream file(path);
    return nlohmann::json::parse(file);
  }
};

/// (x + 1) / 2 of picture 0 at every second row and column: how fixtures store pictures.
inline Tensor thinned_unit_picture(const Tensor& decoded) {
  const std::int64_t height = decoded.dim(2);
  const std::int64_t width = decoded.dim(3);
  Tensor out = Tensor::empty(DType::f32, {1, 3, (height + 1) / 2, (width + 1) / 2});
  float* to = out.data<float>();
  for (std::int64_t c = 0; c < 3; ++c)
    for (std::int64_t y = 0; y < height; y += 2)
      for (std::int64_t x = 0; x < width; x += 2) *to++ = (decoded.data<float>()[(c * height + y) * width + x] + 1) / 2;
  return out;
}

}  // namespace sparvar::testing
