// Loops over independent pieces of work, on the same OpenMP threads that oneDNN uses.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "core/held_signals.h"

namespace sparvar {

/// Threads that the loops below take.
inline int usable_threads() { return omp_get_max_threads(); }

/// Calls body(i) for i in [0, count); pieces are handed out one by one. The first exception is rethrown.
template <typename Body>
void parallel_for(std::int64_t count, Body&& body) {
  if (count <= 1 || omp_get_max_threads() == 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::exception_ptr failure;
  const HeldSignals held;
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical(sparvar_parallel_failure)
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

/// Calls body(begin, end) for pieces of at least `grain` items.
template <typename Body>
void parallel_ranges(std::int64_t count, std::int64_t grain, Body&& body) {
  const std::int64_t pieces = std::min<std::int64_t>((count + grain - 1) / grain, 8L * omp_get_max_threads());
  if (pieces <= 1) {
    if (count > 0) body(std::int64_t{0}, count);
    return;
  }
  parallel_for(pieces, [&](std::int64_t piece) { body(count * piece / pieces, count * (piece + 1) / pieces); });
}

}  // namespace sparvar
