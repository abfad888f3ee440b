// Times of attention alone: a plan at one scale, and within it the kernel that attends to lists of keys.
#pragma once

#include <functional>
#include <optional>

#include "backend/backend.h"
#include "sparvar/attention_plan.h"
#include "sparvar/schedule.h"

namespace sparvar {

/// What this machine does at best.
struct Ceilings {
  double flops = 0;  // a second: product_rate()
  double bytes = 0;  // a second: read and written by a large copy
};
Ceilings measure_ceilings(Backend& backend);

/// Median seconds of a call over `repeat` samples after a warm-up. On a device whose work is asynchronous a sample is
/// some 5 ms of calls.
double warm_seconds(Backend& backend, const std::function<void()>& call, int repeat);

/// One call of attention at a scale, random queries, keys and values.
struct AttentionCase {
  ScaleSchedule schedule;
  AttentionPlan plan;  // layer 0 of it
  int scale = 0;
  int batch = 2, heads = 4, dim = 128;
  TokenOrder order{};
};

struct AttentionTime {
  double seconds = 0;  // median; of a plan that depends on the picture, choosing keys and the residual included
  double share = 1;    // of query-key pairs computed
  double flops = 0;    // of the pairs computed
  double bytes = 0;    // of q, k, v and the output, each once
  int queries = 0, keys = 0;

  /// The kernel alone: dense attention, or attention to lists that are there already.
  struct Kernel {
    double seconds = 0, flops = 0;
    double keys = 0;  // that a query reads, on average
    double error =
        0;  // |output - exact| / |exact| (2-norms) on sampled rows; exact: double precision of the same inputs
  };
  std::optional<Kernel> kernel;  // none where the plan attends both ways: at CS4A's decision scale

  /// Seconds that the arithmetic at the ceiling or the memory's traffic takes, the larger of both.
  double floor(const Ceilings& ceilings) const;
  double kernel_floor(const Ceilings& ceilings) const;
};
/// Throws Error(usage) for a plan that prunes tokens.
AttentionTime measure_attention(Backend& backend, const AttentionCase& of, int repeat);

}  // namespace sparvar
