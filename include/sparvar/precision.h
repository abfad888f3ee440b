// Number types that can be computed in.
#pragma once

namespace sparvar {

/// Of activations, keys and values; sums are f32 whichever it is. bf16: the upper 16 bits of an f32.
enum class Precision { f32, bf16 };

}  // namespace sparvar
