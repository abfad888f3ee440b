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

/// What the groups of a layer chose on one device.
struct ForcedChoice {
  Tensor keys;  // I32 [B * H, groups, counts[0]]
  Tensor sums;  // f32 [B * H, groups, keys]: what it went by; undefined where a run follows another
  std::vector<int> counts;
};

/// What one device did, scale by scale and choice by choice.
struct ForcedRun {
  std::vector<ForcedScale> scales;
  std::vector<ForcedChoice> choices;  // as they were made
};

/// Walks with the bits that options.forced_bits gives; at most settings.scales scales, attention as settings say.
/// `follow`: where settings.shares_choices(), layers take its choices of keys, so that a key that one device chose for
/// another of all but the same weight moves no logits.
ForcedRun run_forced(Infinity& model, Backend& backend, const PackedText& text, WalkOptions options,
                     const Settings& settings, const ForcedRun* follow = nullptr);

/// A line a scale: bits that differ and the largest margin of one. A margin is how far the difference of a bit's logits
/// lies from the value where the bit turns; the larger one of the two devices counts. Judged by the margin, or in bf16
/// by the share of equal bits. Where the runs shared choices, keys that only one of them had chosen must weigh all but
/// the same as those it passed over.
void compare_forced(const std::string& what, const ForcedRun& found, const ForcedRun& reference,
                    const Settings& settings, Report& report);

}  // namespace sparvar::conformance
