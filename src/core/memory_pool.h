// Storage that is given back to a free list instead of to the system: activations of one layer are
// the size of the next one's, and fresh pages cost more than the arithmetic on them.
#pragma once

#include <cstddef>
#include <memory>

namespace sparvar {

/// 64-byte aligned, at least `bytes` long. Throws Error(system) where memory is out.
std::shared_ptr<void> pooled_storage(std::size_t bytes);

/// Gives all free blocks back to the system.
void trim_pool();

}  // namespace sparvar
