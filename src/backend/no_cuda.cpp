// What stands for the CUDA backend in a build without it.
#include "backend/backend.h"

namespace sparvar {

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions&, std::string& why) {
  why = "this build has no CUDA (configure with -DSPARVAR_CUDA=ON)";
  return nullptr;
}

}  // namespace sparvar
