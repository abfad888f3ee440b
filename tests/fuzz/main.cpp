// One libFuzzer program a target: SPARVAR_FUZZ_TARGET names the function.
#include "fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  sparvar::fuzz::SPARVAR_FUZZ_TARGET({data, size});
  return 0;
}
