// Weights of eight bits, with a scale for each output channel.
#pragma once

#include "core/tensor.h"

namespace sparvar {

/// w[o, ...] * scale[o]: w I8 or F8_E4M3 [out, ...], scale f32 [out] -> f32 [out, ...].
Tensor widened(const Tensor& w, const Tensor& scale);

/// The other way round, for I8 (core/e4m3.h: for F8_E4M3): w f32 [out, ...] -> scale f32 [out], largest magnitude of
/// the row / 127 (at least 1e-12 / 127); a NaN or an infinity shows in its row's scale.
Tensor row_scales(const Tensor& w);
/// round(w / scale), half to even, I8 [out, ...].
Tensor narrowed(const Tensor& w, const Tensor& scale);

}  // namespace sparvar
