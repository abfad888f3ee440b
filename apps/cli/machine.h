// What this machine is, for `info` and for reports that name where a figure comes from.
#pragma once

#include <cstdint>
#include <string>

namespace sparvar::cli {

struct Machine {
  std::string processor;  // as the system calls it
  int cores = 0;          // that this process may use
  std::int64_t memory_bytes = 0;
};

Machine this_machine();

/// Largest resident memory of this process so far.
std::int64_t peak_memory_bytes();

const char* commit();  // what was built: git describe, or "unknown"

}  // namespace sparvar::cli
