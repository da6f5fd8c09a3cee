// CUDA C++ as kernels use it, beyond what the toolkit's headers give a host compiler:
// block and warp synchronisation, shuffles, votes, cached loads, atomics, intrinsics.
#pragma once
#include <cmath>
#include <type_traits>

#include "emulation_core.h"

namespace mamba2::emulation {

// Threads that exited no longer count, as on the hardware.
inline void release_if_complete(NamedBarrier& b, int expected) {
  if (b.arrived == 0 || b.arrived < expected) return;
  b.arrived = 0;
  b.expected = 0;
  wake_all(b.waiters);
}

inline void sync_block() {
  Block& block = *grid->current->block;
  NamedBarrier& b = block.barriers[0];
  if (b.expected) fault("__syncthreads while named barrier 0 is in use");
  if (++b.arrived == block.live) {
    release_if_complete(b, block.live);
    yield_after_release();
  } else {
    wait_in(b.waiters, "__syncthreads");
  }
}

// Every lane names the lane that it reads, counted from the first of its group of `width`.
template <class T, class Source>
T shuffle(const char* what, unsigned mask, T v, int width, Source source) {
  struct Lane {
    T in, out;
    Source source;
  } mine{v, v, source};
  meet(what, mask, &mine, [&](void** args) {
    for (int i = 0; i < 32; ++i) {
      if (!args[i]) continue;
      const int first = i / width * width;
      Lane& to = *static_cast<Lane*>(args[i]);
      const int from = to.source(i, first);
      if (from < first || from >= first + width) continue;  // keeps its own value
      if (args[from]) {
        to.out = static_cast<Lane*>(args[from])->in;
      } else {
        std::memset(static_cast<void*>(&to.out), 0xff, sizeof(T));  // undefined: an absent lane
      }
    }
  });
  return mine.out;
}

inline unsigned ballot(const char* what, unsigned mask, bool v) {
  struct Lane {
    bool in;
    unsigned out;
  } mine{v, 0};
  meet(what, mask, &mine, [](void** args) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= args[i] && static_cast<Lane*>(args[i])->in ? 1u << i : 0;
    for (int i = 0; i < 32; ++i) {
      if (args[i]) static_cast<Lane*>(args[i])->out = votes;
    }
  });
  return mine.out;
}

}  // namespace mamba2::emulation

inline void __syncthreads() { mamba2::emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  mamba2::emulation::meet("__syncwarp", mask, nullptr, [](void**) {});
}

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  return mamba2::emulation::shuffle("__shfl_sync", mask, v, width,
                                    [=](int, int first) { return first + lane % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return mamba2::emulation::shuffle("__shfl_xor_sync", mask, v, width,
                                    [=](int i, int) { return i ^ lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned lanes, int width = 32) {
  return mamba2::emulation::shuffle("__shfl_down_sync", mask, v, width,
                                    [=](int i, int) { return i + static_cast<int>(lanes); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned lanes, int width = 32) {
  return mamba2::emulation::shuffle("__shfl_up_sync", mask, v, width,
                                    [=](int i, int) { return i - static_cast<int>(lanes); });
}
inline unsigned __ballot_sync(unsigned mask, int v) {
  return mamba2::emulation::ballot("__ballot_sync", mask, v != 0);
}
inline int __any_sync(unsigned mask, int v) {
  return mamba2::emulation::ballot("__any_sync", mask, v != 0) != 0;
}
inline int __all_sync(unsigned mask, int v) {
  return mamba2::emulation::ballot("__all_sync", mask, v == 0) == 0;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { mamba2::emulation::fault("__trap"); }

template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  const T old = *p;
  *p = old + v;
  mamba2::emulation::progress();
  mamba2::emulation::yield_sometimes();
  return old;
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  const T old = *p;
  *p = old > v ? old : v;
  mamba2::emulation::progress();
  return old;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

template <class To, class From>
To mamba2_emulation_bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline unsigned __float_as_uint(float v) { return mamba2_emulation_bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return mamba2_emulation_bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return mamba2_emulation_bit_cast<float>(v); }
inline float __int_as_float(int v) { return mamba2_emulation_bit_cast<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
