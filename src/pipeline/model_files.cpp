#include "pipeline/model_files.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

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

std::optional<AttentionPlan> model_plan(const std::string& model_dir) {
  const std::string dir = model_dir.empty() ? bundled_model_dir() : model_dir;
  const std::string path = dir + "/plan.json";
  std::error_code error;
  // A link that leads nowhere is there too: from_file says what is wrong with it.
  if (std::filesystem::symlink_status(path, error).type() == std::filesystem::file_type::not_found) return {};
  AttentionPlan plan = AttentionPlan::from_file(path);
  const int layers = read_model_config(dir + "/config.json").transformer.depth;
  for (std::size_t i = 0; i < plan.rules.size(); ++i) {
    const int named = std::max(plan.rules[i].first_layer, plan.rules[i].last_layer);
    if (named >= layers)
      throw Error(ErrorKind::input,
                  fmt::format("{}: rule {}: layer {}, but this model's layers are 0 to {}; it is another model's plan: "
                              "replace it (sparvar tune) or take it away",
                              path, i, named, layers - 1));
  }
  return plan;
}

AttentionPlan default_plan(const ModelInfo& model, int scales) {
  if (scales == static_cast<int>(model.schedule.size()))
    if (std::optional<AttentionPlan> own = model_plan(model.model_dir)) return *own;
  return AttentionPlan::preset(model.on_gpu ? "dense" : "sparvar", model.layers, scales);
}

ScaleSchedule picture_schedule(const std::string& model_dir, const std::string& aspect, const std::string& size) {
  const std::string dir = model_dir.empty() ? bundled_model_dir() : model_dir;
  return picture_shape(read_model_config(dir + "/config.json"), aspect, size, ModelFiles(dir).levels()).schedule;
}

}  // namespace sparvar
