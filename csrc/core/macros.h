// Words that let one source be CUDA, plain C++ and the host emulation.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MAMBA2_HD __host__ __device__ __forceinline__
#define MAMBA2_DEVICE __device__ __forceinline__
#define MAMBA2_GRID_CONSTANT __grid_constant__
#define MAMBA2_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define MAMBA2_UNROLL _Pragma("unroll")
#define MAMBA2_NO_UNROLL _Pragma("unroll 1")
#else
#define MAMBA2_HD inline
#define MAMBA2_DEVICE inline
#define MAMBA2_GRID_CONSTANT
#define MAMBA2_LAUNCH_BOUNDS(threads, blocks)
#define MAMBA2_UNROLL
#define MAMBA2_NO_UNROLL
#endif

// One flag set builds every arch, so a body that only exists on 9.0a is guarded by this.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MAMBA2_EMULATE)
#define MAMBA2_SM90A 1
#else
#define MAMBA2_SM90A 0
#endif

namespace mamba2 {

template <class A, class B>
MAMBA2_HD constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
MAMBA2_HD constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace mamba2
