// Loops over the channels of one row. On x86-64 each is compiled for three levels of the architecture and chosen when
// the program is loaded; sums keep 16 accumulators, so that compilers may use vectors of any width.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/tensor.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SPARVAR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPARVAR_CLONES
#endif

namespace sparvar::rows {

constexpr int kParts = 16;

inline float total(const float (&parts)[kParts]) {
  float sum = 0.0F;
  for (const float part : parts) sum += part;
  return sum;
}

inline void put(float* out, std::int64_t i, float x) { out[i] = x; }
inline void put(BFloat16* out, std::int64_t i, float x) {
  // As to_bfloat16, without the branch: NaN becomes some NaN or infinity, which later checks see as well.
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  out[i].bits = static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}
inline float get(const float* x, std::int64_t i) { return x[i]; }
inline float get(const BFloat16* x, std::int64_t i) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x[i].bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace sparvar::rows
