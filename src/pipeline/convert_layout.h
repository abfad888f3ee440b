// Which tensors the engine reads, and their shapes: what a model folder must hold.
#pragma once

#include <string>
#include <vector>

#include "pipeline/convert_source.h"
#include "weights/config.h"

namespace sparvar {

struct WantedTensor {
  std::string name;
  Shape shape;
};

/// In the order that the engine reads them. Throws Error(input) where one is missing or has another shape: file,
/// tensor, expected, found.
std::vector<WantedTensor> transformer_layout(const InfinityConfig& config, std::size_t scales,
                                             const ConvertSource& source);
/// The encoder too where the checkpoint holds one.
std::vector<WantedTensor> vae_layout(const VaeConfig& config, const ConvertSource& source);
std::vector<WantedTensor> text_layout(const T5Config& config, const ConvertSource& source);

}  // namespace sparvar
