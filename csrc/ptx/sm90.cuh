// PTX of compute capability 9.0 (9.0a for wgmma and setmaxnreg): mbarriers, bulk and tensor copies,
// stmatrix, warpgroup matrix products. Call only from code under MAMBA2_SM90A.
#pragma once
#include "sm80.cuh"
#include "sm90_wgmma.cuh"

#if !defined(MAMBA2_EMULATE)
#include <cuda.h>

#include <cuda/ptx>

namespace mamba2::ptx {

using TensorMap = CUtensorMap;
using Mbarrier = uint64_t;

// ---- mbarrier: a phase completes when `count` arrivals and all expected bytes are in ----
MAMBA2_DEVICE void mbarrier_init(Mbarrier* b, int count) { cuda::ptx::mbarrier_init(b, count); }
MAMBA2_DEVICE void fence_mbarrier_init() {
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
}
MAMBA2_DEVICE void mbarrier_arrive(Mbarrier* b) { cuda::ptx::mbarrier_arrive(b); }
MAMBA2_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* b, uint32_t bytes) {
  cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                       cuda::ptx::space_shared, b, bytes);
}
MAMBA2_DEVICE void mbarrier_expect_tx(Mbarrier* b, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)),
               "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity is complete (a fresh barrier: parity 1 returns at once).
MAMBA2_DEVICE void mbarrier_wait(Mbarrier* b, uint32_t parity) {
  while (!cuda::ptx::mbarrier_try_wait_parity(b, parity)) {
  }
}

// Whether it would not have to wait.
MAMBA2_DEVICE bool mbarrier_passed(Mbarrier* b, uint32_t parity) {
  return cuda::ptx::mbarrier_test_wait_parity(b, parity);
}

// ---- copies by the asynchronous engines; coordinates innermost first, in elements ----
MAMBA2_DEVICE void tma_load_3d(void* smem, const TensorMap* map, int c0, int c1, int c2,
                               Mbarrier* full) {
  const int32_t at[3] = {c0, c1, c2};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, smem, map, at,
                                  full);
}
MAMBA2_DEVICE void tma_load_4d(void* smem, const TensorMap* map, int c0, int c1, int c2, int c3,
                               Mbarrier* full) {
  const int32_t at[4] = {c0, c1, c2, c3};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, smem, map, at,
                                  full);
}
MAMBA2_DEVICE void tma_load_5d(void* smem, const TensorMap* map, int c0, int c1, int c2, int c3,
                               int c4, Mbarrier* full) {
  const int32_t at[5] = {c0, c1, c2, c3, c4};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, smem, map, at,
                                  full);
}
// The same for what nobody else reads: it leaves the L2 first.
MAMBA2_DEVICE void tma_load_4d_once(void* smem, const TensorMap* map, int c0, int c1, int c2,
                                    int c3, Mbarrier* full) {
  asm volatile(
      "{.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], policy;}\n" ::"r"(smem_address(smem)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(smem_address(full))
      : "memory");
}
MAMBA2_DEVICE void tma_store_3d(const TensorMap* map, int c0, int c1, int c2, const void* smem) {
  const int32_t at[3] = {c0, c1, c2};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared, map, at, smem);
}
MAMBA2_DEVICE void tma_store_4d(const TensorMap* map, int c0, int c1, int c2, int c3,
                                const void* smem) {
  const int32_t at[4] = {c0, c1, c2, c3};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared, map, at, smem);
}
// A contiguous run; addresses and size multiples of 16 bytes.
MAMBA2_DEVICE void bulk_load(void* smem, const void* gmem, uint32_t bytes, Mbarrier* full) {
  cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, smem, gmem, bytes,
                           full);
}
MAMBA2_DEVICE void bulk_store(void* gmem, const void* smem, uint32_t bytes) {
  cuda::ptx::cp_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, gmem, smem, bytes);
}
MAMBA2_DEVICE void bulk_commit_group() { cuda::ptx::cp_async_bulk_commit_group(); }
// At most kPending store groups of this thread still read shared memory.
template <int kPending>
MAMBA2_DEVICE void bulk_wait_group_read() {
  cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<kPending>{});
}
// At most kPending store groups of this thread are not yet complete (written).
template <int kPending>
MAMBA2_DEVICE void bulk_wait_group() {
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<kPending>{});
}
MAMBA2_DEVICE void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Ordinary shared-memory accesses before, asynchronous-engine (TMA, wgmma) accesses after.
MAMBA2_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread knows to be in global memory, the asynchronous engine will find there.
MAMBA2_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// One lane of the warp, all of which ask: known to be one, what it issues is issued once.
MAMBA2_DEVICE bool elect_sync() {
  uint32_t elected;
  asm volatile(
      "{.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;}\n"
      : "=r"(elected));
  return elected;
}

// ---- registers and matrices ----
template <int kRegisters>
MAMBA2_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MAMBA2_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
MAMBA2_DEVICE void stmatrix_x4(void* smem_row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   smem_address(smem_row)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
MAMBA2_DEVICE void stmatrix_x4_trans(void* smem_row, uint32_t r0, uint32_t r1, uint32_t r2,
                                     uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   smem_address(smem_row)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

MAMBA2_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MAMBA2_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
MAMBA2_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators across an asynchronous product.
template <int N>
MAMBA2_DEVICE void wgmma_fence_operand(float (&r)[N]) {
  MAMBA2_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
// The same of fragments that a product in flight reads: whoever asks for them behind the wait keeps
// their registers until then. The assembler does so by itself only along simple ways.
template <int N>
MAMBA2_DEVICE void wgmma_fence_operand(const uint32_t (&r)[N]) {
  MAMBA2_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" ::"r"(r[i]) : "memory");
}

// Shared-memory matrix descriptor, 128-byte swizzle, tile base 1024-byte aligned.
// stride_bytes: from 8 rows to the next 8; leading_bytes: between 64-column panels of an MN-major
// tile (unused for K-major).
MAMBA2_DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes,
                                        uint32_t stride_bytes) {
  return uint64_t((smem_address(tile) & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace mamba2::ptx
#endif
