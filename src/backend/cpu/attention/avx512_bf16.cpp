// Attention kernels for avx512-bf16; compiled with that instruction set, called only where the machine has it.
#define SPARVAR_ISA_NAME "avx512-bf16"
#define SPARVAR_LANES 16
#define SPARVAR_MICRO_VECTORS 4
#define SPARVAR_BF16_DOT

#include "backend/cpu/attention/tile_kernel.h"

namespace sparvar {

const AttentionKernels* avx512_bf16_attention_kernels() { return &kKernels; }

}  // namespace sparvar
