#include "pipeline/image_tokenizer.h"

#include <fmt/format.h>

#include "sparvar/error.h"
#include "visual/reconstruct.h"
#include "weights/safetensors.h"

namespace sparvar {

ImageTokenizer ImageTokenizer::load(const PipelineOptions& options) {
  ImageTokenizer out;
  out.dir = options.model_dir.empty() ? bundled_model_dir() : options.model_dir;
  out.config = read_model_config(out.dir + "/config.json");
  const TensorFile weights = TensorFile::open_in(out.dir, "vae");
  out.device = open_device(options);
  out.vae = std::make_unique<BsqVae>(out.config.vae, weights, *out.device.backend);
  out.grids = vae_grids(out.config.schedule, out.config.transformer.apply_spatial_patchify);
  out.height = out.grids.back().h * out.config.vae.patch_size;
  out.width = out.grids.back().w * out.config.vae.patch_size;
  return out;
}

}  // namespace sparvar
