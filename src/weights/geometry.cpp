#include "weights/geometry.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/resolutions.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

struct Released {
  const char* name;
  int depth, width, heads, chunks;
  int codebook_dim, patch_size;
  bool patchify;
  std::vector<int> ch_mult;
};

const std::vector<Released>& released() {
  static const std::vector<Released> all = {
      {"infinity-125m", 12, 768, 8, 4, 16, 16, false, {1, 2, 4, 4, 4}},
      {"infinity-2b", 32, 2048, 16, 8, 32, 16, false, {1, 2, 4, 4, 4}},
      {"infinity-8b", 40, 3584, 28, 8, 14, 8, true, {1, 2, 4, 4}},
  };
  return all;
}

ModelConfig config_of(const Released& model) {
  ModelConfig config;
  config.architecture = "infinity";
  config.transformer.depth = model.depth;
  config.transformer.embed_dim = model.width;
  config.transformer.num_heads = model.heads;
  config.transformer.block_chunks = model.chunks;
  config.transformer.text_channels = 2048;
  config.transformer.codebook_dim = model.codebook_dim;
  config.transformer.apply_spatial_patchify = model.patchify;
  config.vae.codebook_dim = model.codebook_dim;
  config.vae.patch_size = model.patch_size;
  config.vae.ch_mult = model.ch_mult;
  config.schedule = *schedule_1m(1.0);
  config.rope_grid = config.schedule.back();
  config.default_cfg.assign(config.schedule.size(), 4.0F);
  config.default_tau.assign(config.schedule.size(), 1.0F);
  return config;
}

}  // namespace

std::vector<std::string> geometry_names() {
  std::vector<std::string> names;
  for (const Released& model : released()) names.emplace_back(model.name);
  return names;
}

ModelConfig geometry(const std::string& name_or_file) {
  for (const Released& model : released())
    if (name_or_file == model.name) return config_of(model);
  if (name_or_file.ends_with(".json")) return read_model_config(name_or_file);
  throw Error(ErrorKind::usage, fmt::format("there is no geometry '{}': {}, or a FILE.json like a model's config.json",
                                            name_or_file, fmt::join(geometry_names(), ", ")));
}

}  // namespace sparvar
