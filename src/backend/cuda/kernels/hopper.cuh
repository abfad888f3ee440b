// Hopper's own instructions (sm_90a): barriers in shared memory, the tensor copy engine, products of a group of four
// warps, launches that overlap. PTX ISA, sections "mbarrier", "cp.async.bulk.tensor", "wgmma" and "griddepcontrol".
#pragma once

#include <cuda.h>

#include <type_traits>

#include "backend/cuda/kernels/device.cuh"

namespace sparvar::cuda {

// ---------------------------------------------------------------- barriers
__device__ inline void init_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// After init_barrier, before anybody else uses the barriers.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// One arrival, and `bytes` that copies will bring.
__device__ inline void arrive_expecting(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Arrives when this thread's earlier copies (copy_async) have landed; one of the arrivals the barrier was made for.
__device__ inline void arrive_after_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void wait_barrier(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// What threads wrote to shared memory, and a barrier has shown, is seen by the products issued after this.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Where a block is in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned turn = 0;  // parity of the times around
  __device__ void advance() {
    if (++stage == kStages) stage = 0, turn ^= 1U;
  }
};

// ---------------------------------------------------------------- tensor copies
constexpr std::uint64_t kReadOnce = 0x12F0000000000000ULL;  // cache policy: first to be evicted
constexpr std::uint64_t kReadOften = 0x14F0000000000000ULL;

__device__ inline void copy_tile(unsigned to, const CUtensorMap* map, int column, int row, unsigned barrier,
                                 std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], "
      "[%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// ---------------------------------------------------------------- products of a warpgroup
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
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
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

/// d [64, n] (+)= a [64, 16] b [n, 16]^T: value 4 i + j of a thread is row lane / 4 + 8 (j / 2) of its warp's 16,
/// column 8 i + lane % 4 * 2 + j % 2.
template <int kN>
__device__ inline void multiply(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b, int add) {
  if constexpr (kN == 8)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, "
        "%4, %5, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"(add));
  else if constexpr (kN == 32)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(add));
  else if constexpr (kN == 64)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
  else if constexpr (kN == 128)
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}

// ---------------------------------------------------------------- products whose first matrix lies in registers
#define SPARVAR_SUMS_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARVAR_SUMS_40 SPARVAR_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPARVAR_SUMS_48 SPARVAR_SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SPARVAR_SUMS_56 SPARVAR_SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SPARVAR_SUMS_64 SPARVAR_SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARVAR_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SPARVAR_INOUT_32                                                                                \
  SPARVAR_FOUR(0), SPARVAR_FOUR(1), SPARVAR_FOUR(2), SPARVAR_FOUR(3), SPARVAR_FOUR(4), SPARVAR_FOUR(5), \
      SPARVAR_FOUR(6), SPARVAR_FOUR(7)
#define SPARVAR_INOUT_40 SPARVAR_INOUT_32, SPARVAR_FOUR(8), SPARVAR_FOUR(9)
#define SPARVAR_INOUT_48 SPARVAR_INOUT_40, SPARVAR_FOUR(10), SPARVAR_FOUR(11)
#define SPARVAR_INOUT_56 SPARVAR_INOUT_48, SPARVAR_FOUR(12), SPARVAR_FOUR(13)
#define SPARVAR_INOUT_64 SPARVAR_INOUT_56, SPARVAR_FOUR(14), SPARVAR_FOUR(15)
#define SPARVAR_MULTIPLY_HELD(n, sums, a0, a1, a2, a3, matrix, adds, turned)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n            \
               "k16.f32.bf16.bf16 {" SPARVAR_SUMS_##sums "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #matrix \
                                                         ", p, 1, 1, %" #turned ";\n}"                            \
               : SPARVAR_INOUT_##sums                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTurned))

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
#undef SPARVAR_MULTIPLY_HELD

// ---------------------------------------------------------------- turns of warpgroups
/// Warpgroups have the tensor cores to themselves in turn, until the first product of theirs is done: the cores would
/// otherwise work for all of them at once, and all of them would have their softmax at once while the cores stand idle.
/// Named barriers 1 .. kGroups; every warpgroup takes as many turns.
template <int kGroups>
struct Turns {
  int own = 1 + static_cast<int>(threadIdx.x) / 128;
  int next = 1 + own % kGroups;
  __device__ Turns() {
    if (kGroups > 1 && own == kGroups) pass();
  }
  __device__ void wait() const {
    if (kGroups > 1) asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory");
  }
  __device__ void pass() const {
    if (kGroups > 1) asm volatile("bar.arrive %0, 256;" ::"r"(next) : "memory");
  }
};

// ---------------------------------------------------------------- clusters and overlapping launches
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Four floats of the shared memory of another block of the cluster, at the address that they have in this one.
__device__ inline float4 read_cluster(unsigned address, unsigned rank) {
  float4 x;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(address), "r"(rank)
      : "memory");
  return x;
}

}  // namespace sparvar::cuda
