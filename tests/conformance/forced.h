// Two devices (or two types of one) on the same bits: teacher forcing keeps them together, so that what differs at a
// scale is what that scale computed.
#pragma once

#include <string>
#include <vector>

#include "conformance/report.h"
#include "pipeline/walk.h"

namespace sparvar::conformance {

/// What one device made of a scale.
struct ForcedScale {
  Tensor logits;           // f32 [B, n, 2 * bits], after guidance and temperature
  Tensor greedy, sampled;  // U8 [B, n, bits]: the likelier values, and the draws of seed `kForcedSeed`
};

constexpr std::uint64_t kForcedSeed = 1;

/// Walks with the bits that options.forced_bits gives; at most settings.scales scales, attention as settings say.
std::vector<ForcedScale> run_forced(Infinity& model, Backend& backend, const PackedText& text, WalkOptions options,
                                    const Settings& settings);

/// A line a scale: bits that differ and the largest margin of one. A margin is how far the difference of a bit's logits
/// lies from the value where the bit turns; the larger one of the two devices counts. Judged by the margin, or in bf16
/// by the share of equal bits.
void compare_forced(const std::string& what, const std::vector<ForcedScale>& found,
                    const std::vector<ForcedScale>& reference, const Settings& settings, Report& report);

}  // namespace sparvar::conformance
