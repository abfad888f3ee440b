// The caller's cancel flag.
#pragma once

#include <atomic>

#include "sparvar/error.h"

namespace sparvar {

/// Throws Error(cancelled) where there is a flag and it is set.
inline void throw_if_cancelled(const std::atomic<bool>* cancel) {
  if (cancel != nullptr && cancel->load()) throw Error(ErrorKind::cancelled, "cancelled");
}

}  // namespace sparvar
