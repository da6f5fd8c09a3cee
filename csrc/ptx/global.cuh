// Accesses of global memory whose width matters, on every supported card and on the host.
#pragma once
#include "common.cuh"

namespace mamba2::ptx {

// 16 bytes in one store: from the members of a vector the compiler may make four.
MAMBA2_DEVICE void st_global_v4(void* p, uint4 v) {
#if defined(MAMBA2_EMULATE)
  emulation::require_aligned(p, 16, "st_global_v4");
  std::memcpy(p, &v, 16);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#endif
}

}  // namespace mamba2::ptx
