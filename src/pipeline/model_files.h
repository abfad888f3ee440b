// The files of a model folder, and what they say of the model.
#pragma once

#include <string>

#include "sparvar/pipeline.h"
#include "weights/config.h"
#include "weights/safetensors.h"

namespace sparvar {

struct ModelFiles {
  explicit ModelFiles(const std::string& dir)
      : transformer(TensorFile::open_in(dir, "transformer")),
        vae(TensorFile::open_in(dir, "vae")),
        text(TensorFile::open_in(dir, "text_encoder")) {}
  std::int64_t bytes() const { return transformer.bytes() + vae.bytes() + text.bytes(); }
  std::int64_t parameters() const { return transformer.parameters() + vae.parameters() + text.parameters(); }
  /// Scales that the transformer has embeddings for; Infinity's constructor checks the tensor.
  int levels() const {
    const Tensor levels = transformer.get("lvl_embed.weight");
    return levels.rank() == 2 ? static_cast<int>(levels.dim(0)) : 0;
  }
  TensorFile transformer, vae, text;
};

/// ModelInfo but for what depends on the device.
ModelInfo outline(const std::string& dir, const ModelConfig& config, const ModelFiles& files);

}  // namespace sparvar
