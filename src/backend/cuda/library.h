// Shared libraries that are opened when they are first used.
#pragma once

#include <string>

namespace sparvar::cuda {

/// dlopen by plain name, then in the folders the build knew (SPARVAR_CUDA_LIBRARY_DIRS); null where there is none.
void* open_library(const std::string& name);

}  // namespace sparvar::cuda
