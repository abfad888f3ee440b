// Products of a warpgroup on Hopper (PTX ISA, section "wgmma"): of bf16 and of e4m3 numbers, from shared memory or with
// the first matrix in registers.
#pragma once

#include <type_traits>

#include "backend/cuda/kernels/device.cuh"

namespace sparvar::cuda {

/// Rows of 64 bf16 (128 bytes), eight of them swizzled together, as tensor copies with CU_TENSOR_MAP_SWIZZLE_128B leave
/// them. `address` is 1024 bytes aligned, but for steps of 32 bytes along a row.
__device__ inline std::uint64_t matrix_of(unsigned address) {
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 >> 4} << 32;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightRows | (std::uint64_t{1} << 16) | ((address & 0x3ffffU) >> 4);
}
/// The same rows taken as depths: eight depths are 1024 bytes, and 64 columns further on another panel of rows begins.
__device__ inline std::uint64_t turned_matrix_of(unsigned address, unsigned panel_bytes) {
  constexpr std::uint64_t kEightDepths = std::uint64_t{1024 >> 4} << 32;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightDepths | (std::uint64_t{panel_bytes >> 4} << 16) | ((address & 0x3ffffU) >> 4);
}
/// The matrix some bytes, a multiple of 16, further on.
__device__ inline std::uint64_t further(std::uint64_t matrix, unsigned bytes) { return matrix + (bytes >> 4); }
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Between products and whoever reads or writes their registers: keeps the compiler from moving that across the wait.
template <typename T, int kRows, int kColumns>
__device__ inline void settle(T (&x)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      if constexpr (std::is_same_v<T, float>)
        asm volatile("" : "+f"(x[i][j])::"memory");
      else
        asm volatile("" : "+r"(x[i][j])::"memory");
}

#define SPARVAR_SUMS_4 "%0, %1, %2, %3"
#define SPARVAR_SUMS_16 SPARVAR_SUMS_4 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARVAR_SUMS_32 \
  SPARVAR_SUMS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARVAR_SUMS_36 SPARVAR_SUMS_32 ", %32, %33, %34, %35"
#define SPARVAR_SUMS_40 SPARVAR_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPARVAR_SUMS_48 SPARVAR_SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SPARVAR_SUMS_56 SPARVAR_SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SPARVAR_SUMS_64 SPARVAR_SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARVAR_SUMS_72 SPARVAR_SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SPARVAR_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SPARVAR_INOUT_4 SPARVAR_FOUR(0)
#define SPARVAR_INOUT_16 SPARVAR_INOUT_4, SPARVAR_FOUR(1), SPARVAR_FOUR(2), SPARVAR_FOUR(3)
#define SPARVAR_INOUT_32 SPARVAR_INOUT_16, SPARVAR_FOUR(4), SPARVAR_FOUR(5), SPARVAR_FOUR(6), SPARVAR_FOUR(7)
#define SPARVAR_INOUT_36 SPARVAR_INOUT_32, SPARVAR_FOUR(8)
#define SPARVAR_INOUT_40 SPARVAR_INOUT_32, SPARVAR_FOUR(8), SPARVAR_FOUR(9)
#define SPARVAR_INOUT_48 SPARVAR_INOUT_40, SPARVAR_FOUR(10), SPARVAR_FOUR(11)
#define SPARVAR_INOUT_56 SPARVAR_INOUT_48, SPARVAR_FOUR(12), SPARVAR_FOUR(13)
#define SPARVAR_INOUT_64 SPARVAR_INOUT_56, SPARVAR_FOUR(14), SPARVAR_FOUR(15)
#define SPARVAR_INOUT_72 SPARVAR_INOUT_64, SPARVAR_FOUR(16), SPARVAR_FOUR(17)
#define SPARVAR_MULTIPLY(n, types, sums, operand_a, operand_b, adds, rest)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n types \
               " {" SPARVAR_SUMS_##sums "}, %" #operand_a ", %" #operand_b ", p, 1, 1" rest ";\n}"           \
               : SPARVAR_INOUT_##sums                                                                        \
               : "l"(a), "l"(b), "r"(add))
#define SPARVAR_MULTIPLY_HELD(n, sums, a0, a1, a2, a3, operand_b, adds, turned)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n               \
               "k16.f32.bf16.bf16 {" SPARVAR_SUMS_##sums "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #operand_b \
                                                         ", p, 1, 1, %" #turned ";\n}"                               \
               : SPARVAR_INOUT_##sums                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTurned))

#define SPARVAR_MULTIPLY_FITTING(types, rest)                                                       \
  static_assert(kN == 8 || kN == 32 || kN == 64 || kN == 72 || kN == 96 || kN == 128 || kN == 144); \
  if constexpr (kN == 8)                                                                            \
    SPARVAR_MULTIPLY(8, types, 4, 4, 5, 6, rest);                                                   \
  else if constexpr (kN == 32)                                                                      \
    SPARVAR_MULTIPLY(32, types, 16, 16, 17, 18, rest);                                              \
  else if constexpr (kN == 64)                                                                      \
    SPARVAR_MULTIPLY(64, types, 32, 32, 33, 34, rest);                                              \
  else if constexpr (kN == 72)                                                                      \
    SPARVAR_MULTIPLY(72, types, 36, 36, 37, 38, rest);                                              \
  else if constexpr (kN == 96)                                                                      \
    SPARVAR_MULTIPLY(96, types, 48, 48, 49, 50, rest);                                              \
  else if constexpr (kN == 128)                                                                     \
    SPARVAR_MULTIPLY(128, types, 64, 64, 65, 66, rest);                                             \
  else                                                                                              \
    SPARVAR_MULTIPLY(144, types, 72, 72, 73, 74, rest)

/// d [64, n] (+)= a [64, 16] b [n, 16]^T: value d[i][j] of a thread is row lane / 4 + 8 (j / 2) of its warp's 16,
/// column 8 i + lane % 4 * 2 + j % 2.
template <int kN>
__device__ inline void multiply(float (&d)[kN / 8][4], std::uint64_t a, std::uint64_t b, int add) {
  SPARVAR_MULTIPLY_FITTING("k16.f32.bf16.bf16", ", 0, 0");
}

/// The same on e4m3 numbers, with 32 of the depth where bf16 has 16: both are 32 bytes of a row. Sums keep fewer bits
/// than an f32 while a product runs (about 14 of fraction).
template <int kN>
__device__ inline void multiply_e4m3(float (&d)[kN / 8][4], std::uint64_t a, std::uint64_t b, int add) {
  SPARVAR_MULTIPLY_FITTING("k32.f32.e4m3.e4m3", "");
}

/// d [64, n] (+)= a [64, 16] b: rows of b hold the 16 depths of a column of d (matrix_of), or, kTurned = 1, the n
/// columns of one depth (turned_matrix_of). Sums as in multiply(), d[i] those of columns 8 i ..; a as in mma.m16n8k16.
template <int kN, int kTurned>
__device__ inline void multiply_held(float (&d)[kN / 8][4], const unsigned (&a)[4], std::uint64_t b, int add) {
  static_assert(kN == 64 || kN == 80 || kN == 96 || kN == 112 || kN == 128);
  if constexpr (kN == 64)
    SPARVAR_MULTIPLY_HELD(64, 32, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (kN == 80)
    SPARVAR_MULTIPLY_HELD(80, 40, 40, 41, 42, 43, 44, 45, 46);
  else if constexpr (kN == 96)
    SPARVAR_MULTIPLY_HELD(96, 48, 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (kN == 112)
    SPARVAR_MULTIPLY_HELD(112, 56, 56, 57, 58, 59, 60, 61, 62);
  else if constexpr (kN == 128)
    SPARVAR_MULTIPLY_HELD(128, 64, 64, 65, 66, 67, 68, 69, 70);
}
#undef SPARVAR_MULTIPLY_FITTING
#undef SPARVAR_MULTIPLY
#undef SPARVAR_MULTIPLY_HELD

}  // namespace sparvar::cuda
