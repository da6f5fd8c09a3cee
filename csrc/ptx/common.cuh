// PTX that every supported card has. One function = one instruction, named as in the PTX manual.
// Under MAMBA2_EMULATE the same names come from emulation.h, which runs them on the host.
#pragma once
#include "../core/macros.h"

#if defined(MAMBA2_EMULATE)
#include "emulation.h"
#else
#include <cuda_runtime.h>

namespace mamba2::ptx {

// The block's dynamic shared memory, 1024-byte aligned (what 128-byte swizzled tiles want).
MAMBA2_DEVICE void* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char smem[];
  return smem;
}
// Address in the shared window, which is what shared-memory instructions take.
MAMBA2_DEVICE uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The thread's number in its warp. Every call reads it anew (see tile/sm80.cuh).
MAMBA2_DEVICE int laneid() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it
// is used, not kept in registers from one round of a loop to the next.
MAMBA2_DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// 2^x, x * 2^n exact, subnormal results flushed to zero. ex2(-160) == 0.
MAMBA2_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MAMBA2_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Named barriers 1..15 (0 is __syncthreads); `threads` is a multiple of 32.
MAMBA2_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Flags in global memory, between blocks of one grid.
MAMBA2_DEVICE int ld_acquire_gpu(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MAMBA2_DEVICE void st_release_gpu(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MAMBA2_DEVICE void st_relaxed_gpu(int* p, int v) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// What this thread knows of comes before the flags it raises from here on.
MAMBA2_DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MAMBA2_DEVICE int atom_add_relaxed_gpu(int* p, int v) {
  int old;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}
MAMBA2_DEVICE int atom_add_acquire_gpu(int* p, int v) {
  int old;
  asm volatile("atom.add.acquire.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}
// Global data that this grid wrote through another SM: read at L2, never from a stale L1 line.
MAMBA2_DEVICE float4 ld_cg_v4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// Programmatic dependent launch: wait for the kernels before this one; let the next one start.
// (A no-op before sm_90, where such launches do not exist.)
MAMBA2_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MAMBA2_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A gentle spin.
MAMBA2_DEVICE void nanosleep(unsigned ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

}  // namespace mamba2::ptx
#endif
