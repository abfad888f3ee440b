// Weights of eight bits, with a scale for each output channel.
#pragma once

#include "core/tensor.h"

namespace sparvar {

/// w[o, ...] * scale[o]: w I8 [out, ...], scale f32 [out] -> f32 [out, ...].
Tensor widened(const Tensor& w, const Tensor& scale);

}  // namespace sparvar
