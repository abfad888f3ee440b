// Attention kernels for avx2; compiled with that instruction set, called only where the machine has it.
#define SPARVAR_ISA_NAME "avx2"
#define SPARVAR_LANES 8
#define SPARVAR_MICRO_VECTORS 2

#include "backend/cpu/attention/tile_kernel.h"

namespace sparvar {

const AttentionKernels* avx2_attention_kernels() { return &kKernels; }

}  // namespace sparvar
