// What `tune` chooses among: ways of one layer, and plans made of them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "sparvar/attention_plan.h"

namespace sparvar {

/// What one layer does: a method from a scale on, dense before. Dense everywhere: the method says so.
struct LayerOption {
  std::string name;
  AttentionMethod method;
  int first_scale = 0;
  bool operator==(const LayerOption& other) const { return method == other.method && first_scale == other.first_scale; }
};

/// Options by layer: indices into a table of options.
using Assignment = std::vector<int>;

/// Rules of adjacent layers with the same option are one.
AttentionPlan plan_of(const std::string& name, const std::vector<LayerOption>& options, const Assignment& layers);

/// A two-part assignment: `below` in layers 0 .. bound, `above` in the others.
Assignment split_at(int layers, int bound, int below, int above);

/// A table of `count` different options that are sparse somewhere: first those of the presets, then ones drawn at
/// random. The same seed gives the same table.
std::vector<LayerOption> option_pool(int layers, int scales, int count, std::mt19937_64& random);

/// A number from 0 to `below` - 1, the same on every machine.
inline std::size_t drawn(std::mt19937_64& random, std::size_t below) { return random() % below; }

}  // namespace sparvar
