// The attention plan: for every layer and scale, which keys each group of queries reads.
// Source: SparVAR (arXiv 2602.04361) sections on CS4A and CSLA; `probe` is this project's own.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "sparvar/schedule.h"

namespace sparvar {

/// All keys of scales 0..k.
struct DenseAttention {
  bool operator==(const DenseAttention&) const = default;
};

/// A group of queries that share a list of keys: th x tw tokens of the grid, or `rows` tokens in row order (rows > 0).
struct QueryGroup {
  int tile_h = 8;
  int tile_w = 8;
  int rows = 0;
  bool operator==(const QueryGroup&) const = default;
};

/// Cross-scale local sparse attention: static windows.
struct CslaAttention {
  enum class Form { lists, blocks };  // exact keys per query tile, or whole row-major blocks as published
  enum class Centre {
    published,
    half_pixel
  };  // round(y / H * h), or the half-pixel centre that is right at the border
  std::vector<int> windows = {-1, -1, -1, -1, -1, -1, -1,
                              -1, 1,  1,  3,  5,  7};  // side in tokens by key scale; -1: none; missing: none
  int sink_scales = 5;                                 // the first scales, read whole
  Form form = Form::lists;
  Centre centre = Centre::published;
  QueryGroup group{8, 16, 0};
  int block = 128;  // Form::blocks
  bool operator==(const CslaAttention&) const = default;
};

/// Cross-scale self-similar sparse attention: keys chosen at the decision scale and carried up.
struct Cs4aAttention {
  enum class Carry { ratio, group, grid };
  int decision_scale = 10;
  double share = 0.2;           // of the keys there are at the decision scale
  int granularity = 64;         // kept keys are a multiple of it
  QueryGroup group{8, 8, 192};  // rows = 192: as published
  Carry carry = Carry::group;
  std::vector<int> own_windows = {7, 9};  // side of the own-scale window at decision_scale + 1, + 2, ... (0: none)
  bool residual = true;                   // residual cache
  bool operator==(const Cs4aAttention&) const = default;
};

/// A grid of queries of the same scale runs dense and chooses each tile's keys.
struct ProbeAttention {
  int stride = 8;       // every stride-th row and column is a probe
  double share = 0.03;  // of the keys there are, per tile
  QueryGroup group{8, 8, 0};
  int window = 7;         // side in tokens, around the tile's queries
  int window_scales = 3;  // on the own scale and the ones before
  int sink_scales = 0;
  bool residual = true;  // the probes' dense minus sparse output, upsampled, is added
  bool operator==(const ProbeAttention&) const = default;
};

using AttentionMethod = std::variant<DenseAttention, CslaAttention, Cs4aAttention, ProbeAttention>;

/// Layers [first_layer, last_layer] at scales [first_scale, last_scale] use `method`; -1: to the end.
struct AttentionRule {
  int first_layer = 0;
  int last_layer = -1;
  int first_scale = 10;
  int last_scale = -1;
  AttentionMethod method;
  bool operator==(const AttentionRule&) const = default;
};

/// At scales from first_scale on only some tokens run, dense: the share of `keep` that differ most from the mean of
/// their map. Keys of the others are never made; the output of the scale before
/// first_scale, resized, stands for theirs. On the CPU, one picture at a time.
struct TokenPruning {
  int first_scale = 10;                          // 1 or more
  std::vector<double> keep = {0.5, 0.35, 0.25};  // by scale from first_scale on; the last one for all further ones
  bool operator==(const TokenPruning&) const = default;
};

/// Rules in order; the first that fits a (layer, scale) holds, and where none fits attention is dense.
struct AttentionPlan {
  std::string name = "dense";
  std::vector<AttentionRule> rules;
  std::optional<TokenPruning> pruning{};
  std::vector<std::string> note{};  // lines for whoever reads the plan; they change nothing

  const AttentionMethod& method(int layer, int scale) const;
  /// Of the tokens of a scale, those that run.
  int tokens_run(int scale, Grid grid) const;
  /// Does all of it depend on the schedule alone (dense, CSLA, no pruning)?
  bool is_static() const;
  /// Throws Error(usage) where a value is impossible, naming it.
  void validate() const;
  bool operator==(const AttentionPlan&) const = default;

  /// dense | csla | csla-blocks | cs4a | cs4a-rows | cs4a-nocache | probe | published | sparvar | fastvar, or fastvar:R
  /// (R, more than 0 to 1: the share of tokens that run at each pruned scale). Throws Error(usage) for another name.
  /// `scales`: how many scales the model has: sparse scales are the last three of 13 and shift with it.
  static AttentionPlan preset(const std::string& name, int layers, int scales);
  static std::vector<std::string> preset_names();
  static AttentionPlan from_json(const std::string& text, const std::string& where);
  static AttentionPlan from_file(const std::string& path);
  std::string to_json() const;
};

}  // namespace sparvar
