// Attention kernels for avx512; compiled with that instruction set, called only where the machine has it.
#define SPARVAR_ISA_NAME "avx512"
#define SPARVAR_LANES 16
#define SPARVAR_MICRO_VECTORS 4

#include "backend/cpu/attention/tile_kernel.h"

namespace sparvar {

const AttentionKernels* avx512_attention_kernels() { return &kKernels; }

}  // namespace sparvar
