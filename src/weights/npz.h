// NumPy's .npz: a zip of .npy files, stored without compression.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace sparvar {

/// The bytes of a file that numpy.load reads: host tensors of f32, f64, integers and booleans by name. Throws
/// Error(usage) for another type, and where it would pass the 4 GiB a plain zip can hold.
std::vector<std::uint8_t> npz_bytes(const std::vector<std::pair<std::string, Tensor>>& arrays);

}  // namespace sparvar
