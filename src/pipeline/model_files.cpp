#include "pipeline/model_files.h"

#include "pipeline/picture_shape.h"
#include "weights/fingerprint.h"

namespace sparvar {

ModelInfo outline(const std::string& dir, const ModelConfig& config, const ModelFiles& files) {
  const InfinityConfig& t = config.transformer;
  ModelInfo info;
  info.model_dir = dir;
  info.model_hash = fingerprint(dir);
  info.architecture = config.architecture;
  info.layers = t.depth;
  info.width = t.embed_dim;
  info.heads = t.num_heads;
  info.head_dim = t.head_dim();
  info.bits = t.bits();
  info.transformer_parameters = files.transformer.parameters();
  info.vae_parameters = files.vae.parameters();
  info.text_parameters = files.text.parameters();
  info.schedule = config.schedule;
  const int pixels = config.vae.patch_size * (t.apply_spatial_patchify ? 2 : 1);
  info.picture_height = config.schedule.back().h * pixels;
  info.picture_width = config.schedule.back().w * pixels;
  info.default_cfg = config.default_cfg;
  info.default_tau = config.default_tau;
  return info;
}

ModelInfo model_outline(const std::string& model_dir) {
  const std::string dir = model_dir.empty() ? bundled_model_dir() : model_dir;
  return outline(dir, read_model_config(dir + "/config.json"), ModelFiles(dir));
}

ScaleSchedule picture_schedule(const std::string& model_dir, const std::string& aspect, const std::string& size) {
  const std::string dir = model_dir.empty() ? bundled_model_dir() : model_dir;
  return picture_shape(read_model_config(dir + "/config.json"), aspect, size, ModelFiles(dir).levels()).schedule;
}

}  // namespace sparvar
