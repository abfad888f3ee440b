// Files that are whole or not there.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace sparvar {

/// Writes `bytes` aside, in the same folder, then renames: `path` holds all of them or what it held before, and nothing
/// is left behind on failure. Devices and pipes are written directly. Throws Error(system) naming the path and the
/// cause.
void write_file_atomically(const std::string& path, std::span<const std::uint8_t> bytes);

}  // namespace sparvar
