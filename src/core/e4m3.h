// 8-bit floats with a scale for every row (OCP "8-bit floating point", E4M3: a sign, 4 bits of exponent, 3 of fraction;
// the largest is 448, there is a NaN and no infinity). The host's side of backend/cuda/kernels/e4m3.cuh: the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor.h"

namespace sparvar {

/// The nearest number, ties to even; beyond the largest comes the largest, of either sign.
std::uint8_t to_e4m3(float value);
float e4m3_to_float(std::uint8_t bits);

/// Can a layer [out, in] multiply such numbers? cuBLASLt's alignment, and what quantise_rows keeps in registers.
constexpr std::int64_t kWidestE4m3 = 32768;
constexpr bool fits_e4m3(std::int64_t out, std::int64_t in) {
  return out > 0 && in > 0 && out % 16 == 0 && in % 16 == 0 && in <= kWidestE4m3;
}

/// Bytes that a tensor lies in: those of its numbers, of e4m3 with the scales of its rows behind them.
std::size_t storage_bytes(DType dtype, const Shape& shape);
/// Of an e4m3 tensor [..., C], [rows], where its numbers are: on the host or on its device.
float* scales_of(Tensor& x);
const float* scales_of(const Tensor& x);

/// Host tensor [..., C], as e4m3 with a scale for every row of C: largest magnitude / 448, at least 2^-120. A bf16
/// tensor gives the bits that a GPU makes of it while it is loaded with fp8 weights.
Tensor e4m3_rows(const Tensor& x);
/// The scales of those rows alone, f32 [rows], [0] where there are no numbers.
Tensor e4m3_row_scales(const Tensor& x);

}  // namespace sparvar
