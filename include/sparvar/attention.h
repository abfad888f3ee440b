// The attention kernel, with a plan, on the caller's own buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "sparvar/attention_plan.h"
#include "sparvar/error.h"
#include "sparvar/precision.h"
#include "sparvar/schedule.h"

namespace sparvar {

struct QueryTiles;  // src/attention/key_lists.h: not a part of the stable interface
struct KeyLists;

/// Where rows lie, in elements: row r of head h of batch entry b begins at b * batch + h * head + r * row. The channels
/// of a row lie next to each other. A stride of 0 shares: k and v with head = 0 serve every head.
struct AttentionStrides {
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t row = 0;
};

/// The caller's memory, of the prepared type (bf16: 16-bit words). q and out have a row for each token of the scale,
/// row-major; k and v one for each token of this scale and all before, in that order.
struct AttentionBuffers {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;  // overlaps none of the others; its rows do not overlap
  AttentionStrides q_strides;
  AttentionStrides k_strides;
  AttentionStrides v_strides;
  AttentionStrides out_strides;
};

struct AttentionShape {
  int batch = 1;
  int heads = 1;
  int head_dim = 64;  // 1 to 256
  Precision precision = Precision::f32;
  float scale = 0;  // of the logits; 0: 1 / sqrt(head_dim)
  int threads = 0;  // 0: all cores
};

/// softmax(scale q k^T) v for one scale and layer of a plan, each query over the keys that the plan shows it. Made
/// once, run many times: tiles, lists of keys and working memory are held here, and run() allocates nothing.
class PreparedAttention {
 public:
  /// Throws Error(usage) where a value is impossible, or where the plan's method at (layer, scale) chooses its keys
  /// while it runs (cs4a, probe): such lists depend on the buffers and on other scales.
  PreparedAttention(const AttentionPlan& plan, const ScaleSchedule& schedule, int scale, int layer,
                    const AttentionShape& shape);
  /// For tools of this repository: lists of the caller's own, one for all heads, of tiles that hold each of the queries
  /// 0 .. n - 1 once. Throws Error(usage) where they are not sound or reach beyond `keys`.
  PreparedAttention(const QueryTiles& tiles, const KeyLists& lists, int keys, const AttentionShape& shape);
  PreparedAttention(PreparedAttention&&) noexcept;
  PreparedAttention& operator=(PreparedAttention&&) noexcept;
  ~PreparedAttention();

  int queries() const;            // rows of q and out
  int keys() const;               // rows of k and v
  double share_of_pairs() const;  // of query-key pairs that are computed; 1: dense
  std::size_t workspace_bytes() const;

  /// In the object's own working memory: not from two threads at once. Throws Error(usage) for a null pointer or
  /// output rows that overlap.
  void run(const AttentionBuffers& buffers);
  /// In the caller's, of at least workspace_bytes(): from any number of threads at once, each with its own.
  void run(const AttentionBuffers& buffers, std::span<std::byte> workspace) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sparvar
