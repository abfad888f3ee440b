// The image tokenizer of a model folder, without the rest of the model.
#pragma once

#include <memory>
#include <string>

#include "pipeline/device.h"
#include "visual/bsq_vae.h"
#include "weights/config.h"

namespace sparvar {

struct ImageTokenizer {
  /// `options.model_dir` empty: the bundled model. Throws Error where the folder is not a model.
  static ImageTokenizer load(const PipelineOptions& options);

  std::string dir;
  ModelConfig config;
  Device device;
  std::unique_ptr<BsqVae> vae;
  ScaleSchedule grids;  // the VAE's
  int width = 0, height = 0;
};

}  // namespace sparvar
