// Hopper's own instructions (sm_90a): barriers in shared memory, the tensor copy engine, launches that overlap. PTX
// ISA, sections "mbarrier", "cp.async.bulk.tensor", "setmaxnreg" and "griddepcontrol". Products are in wgmma.cuh.
#pragma once

#include <cuda.h>

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

/// Of this thread, so that the compiler sees that all of a warp have the same.
__device__ inline unsigned warpgroup() { return __shfl_sync(0xffffffffU, threadIdx.x / 128, 0); }

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

/// Has the description of a matrix read, which the first copy would otherwise wait for. `map`: a kernel's parameter.
__device__ inline void fetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void copy_tile(unsigned to, const CUtensorMap* map, int column, int row, unsigned barrier,
                                 std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], "
      "[%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

/// A box of one of several matrices.
__device__ inline void copy_box(unsigned to, const CUtensorMap* map, int column, int row, int matrix,
                                unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

// ---------------------------------------------------------------- registers of warpgroups
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---------------------------------------------------------------- turns of warpgroups
/// Warpgroups have the tensor cores to themselves in turn, until their products are asked for, or done: the cores would
/// otherwise work for all of them at once, and all of them would have their softmax at once while the cores stand idle.
/// Named barriers 1 .. kGroups; every warpgroup takes as many turns.
template <int kGroups>
struct Turns {
  int own = 1 + static_cast<int>(threadIdx.x) / 128;
  int next = 1 + own % kGroups;
  __device__ Turns() {
    if (own == kGroups) pass();
  }
  __device__ void wait() const { asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory"); }
  __device__ void pass() const { asm volatile("bar.arrive %0, 256;" ::"r"(next) : "memory"); }
};

__device__ inline float4 read_shared(unsigned address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// ---------------------------------------------------------------- clusters and overlapping launches
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The same without anything having to be seen: so that no block leaves while others read its memory.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
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
