// Number types that can be computed in.
#pragma once

namespace sparvar {

/// Of activations, keys and values; sums are f32 whichever it is. bf16: the upper 16 bits of an f32.
enum class Precision { f32, bf16 };

/// How the weights of the transformer's blocks are kept and multiplied. plain: as the activations. fp8: 8-bit floats
/// (e4m3) with a factor for every output channel, activations likewise with one for every token; Hopper GPUs, bf16.
/// as_stored: fp8 where the model folder holds them so and the device multiplies them, else plain.
enum class WeightFormat { plain, fp8, as_stored };

}  // namespace sparvar
