#include "backend/cuda/library.h"

#include <dlfcn.h>

#include <sstream>

namespace sparvar::cuda {

void* open_library(const std::string& name) {
  if (void* found = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL)) return found;
  std::istringstream folders(SPARVAR_CUDA_LIBRARY_DIRS);
  for (std::string path; std::getline(folders, path, ':');) {
    path += '/';
    path += name;
    if (void* found = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return found;
  }
  return nullptr;
}

}  // namespace sparvar::cuda
