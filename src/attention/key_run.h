// A run of keys. Alone in its header: kernels compiled for newer machines include it, and nothing else.
#pragma once

#include <cstdint>

namespace sparvar {

/// `count` consecutive keys from `begin`.
struct KeyRun {
  std::int32_t begin = 0;
  std::int32_t count = 0;
  bool operator==(const KeyRun&) const = default;
};

}  // namespace sparvar
