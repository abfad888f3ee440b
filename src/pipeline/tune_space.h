// What `tune` chooses among: ways of one layer, plans made of them, and the steps from one to the next.
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

/// Layers [first, end) that share an option.
struct LayerRun {
  int first = 0;
  int end = 0;
  int option = 0;
};
std::vector<LayerRun> runs_of(const Assignment& layers);

/// Rules of adjacent layers with the same option are one.
AttentionPlan plan_of(const std::string& name, const std::vector<LayerOption>& options, const Assignment& layers);

/// "probe", or "0-2 cs4a, 3-7 probe".
std::string name_of(const std::vector<LayerOption>& options, const Assignment& layers);

/// A two-part assignment: `below` in layers 0 .. bound, `above` in the others.
Assignment split_at(int layers, int bound, int below, int above);

/// A table of `count` different options that are sparse somewhere: first those of the presets, then ones drawn at
/// random. The same seed gives the same table.
std::vector<LayerOption> option_pool(int layers, int scales, int count, std::mt19937_64& random);

/// First scale whose attention is counted: no option is sparse before it.
int first_tuned_scale(int scales);

/// Options one step away: another decision or first sparse scale, share of keys, window of one scale, number of sinks,
/// group shape, stride or carry form; with the residual or without. All are valid and none is `option` itself.
std::vector<LayerOption> neighbours(const LayerOption& option, int scales);

/// What an option is, in few words: "probe 1/64 3% 8x8 w7x3 sinks 5 residual, from 10".
std::string described(const LayerOption& option);

/// A number from 0 to `below` - 1, the same on every machine.
inline std::size_t drawn(std::mt19937_64& random, std::size_t below) { return random() % below; }

}  // namespace sparvar
