#include <atomic>
#include <cstring>

#include "backend/cpu/attention/kernels.h"

namespace sparvar {

#ifndef SPARVAR_X86
const AttentionKernels* avx2_attention_kernels() { return nullptr; }
const AttentionKernels* avx512_attention_kernels() { return nullptr; }
const AttentionKernels* avx512_bf16_attention_kernels() { return nullptr; }
#endif

namespace {

std::atomic<const AttentionKernels*> chosen{nullptr};

/// `kernels` where this machine runs them, else null.
const AttentionKernels* if_supported(const AttentionKernels* kernels) {
#ifdef SPARVAR_X86
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
                      __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
  if (kernels == avx2_attention_kernels()) return avx2 ? kernels : nullptr;
  if (kernels == avx512_attention_kernels()) return avx512 ? kernels : nullptr;
  if (kernels == avx512_bf16_attention_kernels())
    return avx512 && __builtin_cpu_supports("avx512bf16") != 0 ? kernels : nullptr;
#endif
  return kernels;
}

const AttentionKernels* find(const char* name) {
  for (const AttentionKernels* kernels : {avx512_bf16_attention_kernels(), avx512_attention_kernels(),
                                          avx2_attention_kernels(), generic_attention_kernels()}) {
    if (kernels == nullptr || if_supported(kernels) == nullptr) continue;
    if (*name == '\0' || std::strcmp(name, kernels->name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace

const AttentionKernels& attention_kernels() {
  const AttentionKernels* kernels = chosen.load();
  if (kernels == nullptr) {
    kernels = find("");
    chosen.store(kernels);
  }
  return *kernels;
}

const char* attention_kernels_reason() {
  const AttentionKernels* kernels = &attention_kernels();
  if (kernels != find("")) return "these attention kernels were asked for";
  if (kernels == avx512_bf16_attention_kernels()) return "the processor has AVX-512 and its bf16 products";
  if (kernels == avx512_attention_kernels()) return "the processor has AVX-512, but not its bf16 products";
  if (kernels == avx2_attention_kernels()) return "the processor has AVX2 and FMA, but not AVX-512 F, BW, DQ and VL";
  return "the processor has none of AVX2 and AVX-512";
}

bool select_attention_kernels(const char* name) {
  const AttentionKernels* kernels = find(name);
  if (kernels == nullptr) return false;
  chosen.store(kernels);
  return true;
}

}  // namespace sparvar
