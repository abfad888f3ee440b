// Attention kernels for any machine (128-bit vectors).
#define SPARVAR_ISA_NAME "generic"
#define SPARVAR_LANES 4
#define SPARVAR_MICRO_VECTORS 2

#include "backend/cpu/attention/tile_kernel.h"

namespace sparvar {

const AttentionKernels* generic_attention_kernels() { return &kKernels; }

}  // namespace sparvar
