// common.cuh and sm80.cuh on the host.
#pragma once
#include "../core/convert.cuh"
#include "emulation_builtins.h"

namespace mamba2::emulation {

inline void named_barrier(int id, int threads) {
  Block& block = *grid->current->block;
  if (id < 1 || id > 15) fault("named barrier %d: must be 1 to 15", id);
  if (threads <= 0 || threads % 32 || threads > grid->threads) {
    fault("named barrier %d: %d threads is not a multiple of 32 up to the block's %d", id, threads,
          grid->threads);
  }
  NamedBarrier& b = block.barriers[id];
  if (b.arrived && b.expected != threads) {
    fault("named barrier %d: %d threads expected here, %d elsewhere", id, threads, b.expected);
  }
  b.expected = threads;
  if (++b.arrived == threads) {
    release_if_complete(b, threads);
    yield_after_release();
  } else {
    wait_in(b.waiters, "named barrier", static_cast<uint32_t>(id));
  }
}

inline void perform(const ThreadCopy& c) {
  if (c.valid) {
    std::memcpy(c.smem, c.gmem, 16);
  } else {
    std::memset(c.smem, 0, 16);
  }
}

// The two 16-bit values of a register, as floats.
template <class T>
float2 operand(uint32_t r) {
  return unpack2<T>(r);
}

// An 8x8 matrix of 16-bit elements: lane t holds elements (t/4, 2(t%4)) and the next; transposed:
// (2(t%4), t/4) and the one below.
inline uint32_t load_pair(const void* const* rows, int lane, bool transposed) {
  uint16_t v[2];
  for (int i = 0; i < 2; ++i) {
    const int row = transposed ? lane % 4 * 2 + i : lane / 4;
    const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
    std::memcpy(&v[i], static_cast<const char*>(rows[row]) + column * 2, 2);
  }
  return v[0] | static_cast<uint32_t>(v[1]) << 16;
}
inline void store_pair(void* const* rows, int lane, bool transposed, uint32_t pair) {
  for (int i = 0; i < 2; ++i) {
    const uint16_t v = static_cast<uint16_t>(pair >> 16 * i);
    const int row = transposed ? lane % 4 * 2 + i : lane / 4;
    const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
    std::memcpy(static_cast<char*>(rows[row]) + column * 2, &v, 2);
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* what) {
  window_address(row, 16, what);
  require_aligned(row, 16, what);
  struct Lane {
    const void* row;
    uint32_t* r;
  } mine{row, r};
  meet_warp(what, &mine, [transposed](void** args) {
    const void* rows[32];
    for (int i = 0; i < 32; ++i) rows[i] = static_cast<Lane*>(args[i])->row;
    for (int i = 0; i < 32; ++i) {
      for (int m = 0; m < 4; ++m) {
        static_cast<Lane*>(args[i])->r[m] = load_pair(rows + 8 * m, i, transposed);
      }
    }
  });
}
inline void store_matrices(void* row, const uint32_t (&r)[4], bool transposed, const char* what) {
  window_address(row, 16, what);
  require_aligned(row, 16, what);
  struct Lane {
    void* row;
    const uint32_t* r;
  } mine{row, r};
  meet_warp(what, &mine, [transposed](void** args) {
    void* rows[32];
    for (int i = 0; i < 32; ++i) rows[i] = static_cast<Lane*>(args[i])->row;
    for (int i = 0; i < 32; ++i) {
      for (int m = 0; m < 4; ++m) {
        store_pair(rows + 8 * m, i, transposed, static_cast<Lane*>(args[i])->r[m]);
      }
    }
  });
}

// Element (row, k) of an m16k16 A fragment: lane 4 (row % 8) + k % 8 / 2 holds it.
template <class T>
void unpack_a(float (&a)[16][16], int lane, const uint32_t* r) {
  for (int i = 0; i < 4; ++i) {
    const float2 v = operand<T>(r[i]);
    const int row = lane / 4 + 8 * (i & 1), k = lane % 4 * 2 + 8 * (i >> 1);
    a[row][k] = v.x;
    a[row][k + 1] = v.y;
  }
}

// d (16, n) += a (16, 16) b (16, n)
__attribute__((optimize("O3"))) inline void multiply_add(float* __restrict__ d,
                                                         const float* __restrict__ a,
                                                         const float* __restrict__ b, int n) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float v = a[row * 16 + k];
      for (int i = 0; i < n; ++i) d[row * n + i] += v * b[k * n + i];
    }
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  meet_warp("mma_m16n8k16", &mine, [](void** args) {
    float a[16][16], b[16][8], d[16][8];
    const auto row = [](int lane, int i) { return lane / 4 + 8 * (i >> 1); };
    const auto column = [](int lane, int i) { return lane % 4 * 2 + (i & 1); };
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& l = *static_cast<Lane*>(args[lane]);
      unpack_a<T>(a, lane, l.a);
      for (int j = 0; j < 2; ++j) {
        const float2 v = operand<T>(l.b[j]);
        b[lane % 4 * 2 + 8 * j][lane / 4] = v.x;
        b[lane % 4 * 2 + 8 * j + 1][lane / 4] = v.y;
      }
      for (int i = 0; i < 4; ++i) d[row(lane, i)][column(lane, i)] = l.d[i];
    }
    multiply_add(d[0], a[0], b[0], 8);
    for (int lane = 0; lane < 32; ++lane) {
      float* to = static_cast<Lane*>(args[lane])->d;
      for (int i = 0; i < 4; ++i) to[i] = d[row(lane, i)][column(lane, i)];
    }
  });
}

}  // namespace mamba2::emulation

namespace mamba2::ptx {

inline void* dynamic_smem() { return emulation::grid->current->block->smem; }
inline int laneid() { return static_cast<int>(threadIdx.x % 32); }
inline int anew(int v) { return v; }
inline bool elect_sync() { return laneid() == 0; }
inline uint32_t smem_address(const void* p) {
  return emulation::window_address(p, 0, "smem_address");
}

inline float flush_subnormal(float v) { return std::fabs(v) < 1.17549435e-38f ? 0.0f * v : v; }
inline float ex2(float x) { return flush_subnormal(std::exp2(flush_subnormal(x))); }
template <class T>
uint32_t fma_rn_x2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 u = unpack2<T>(a), v = unpack2<T>(b), w = unpack2<T>(c);
  const T d[2] = {convert<T>(double(u.x) * v.x + w.x), convert<T>(double(u.y) * v.y + w.y)};
  uint32_t pair;
  std::memcpy(&pair, d, 4);
  return pair;
}
inline float rcp(float x) { return flush_subnormal(1.0f / flush_subnormal(x)); }

inline void bar_sync(int id, int threads) { emulation::named_barrier(id, threads); }

inline int ld_acquire_gpu(const int* p) {
  emulation::spin("ld_acquire_gpu");
  emulation::grid->current->acquired = emulation::grid->current->block->acquired = true;
  return *static_cast<const volatile int*>(p);
}
inline void st_relaxed_gpu(int* p, int v) {
  *static_cast<volatile int*>(p) = std::min(v, emulation::options().most_released);
  emulation::progress();
  emulation::yield_sometimes();
}
inline void fence_acq_rel_gpu() {}
inline void st_release_gpu(int* p, int v) { st_relaxed_gpu(p, v); }
inline int atom_add_relaxed_gpu(int* p, int v) {
  emulation::yield_sometimes();
  const int old = *p;
  *p = old + v;
  emulation::progress();
  return old;
}
inline int atom_add_acquire_gpu(int* p, int v) { return atom_add_relaxed_gpu(p, v); }
inline float4 ld_cg_v4(const float* p) {
  emulation::require_aligned(p, 16, "ld_cg_v4");
  return *reinterpret_cast<const float4*>(p);
}
inline void griddepcontrol_wait() {
  emulation::grid->current->block->waited_for_grid = emulation::grid->waited = true;
}
inline void griddepcontrol_launch_dependents() {}
inline void nanosleep(unsigned) { emulation::spin("nanosleep"); }

inline void cp_async_16(void* smem, const void* gmem, bool valid) {
  using namespace emulation;
  Fiber* f = grid->current;
  window_address(smem, 16, "cp_async_16");
  require_aligned(smem, 16, "cp_async_16: shared");
  if (valid) require_aligned(gmem, 16, "cp_async_16: global");
  const ThreadCopy copy{smem, gmem, valid, f->copy_groups};
  if (at_once()) {
    perform(copy);
  } else {
    poison(smem, 16);
    f->copies.push_back(copy);
  }
}
inline void cp_async_commit_group() { ++emulation::grid->current->copy_groups; }
template <int kPending>
void cp_async_wait_group() {
  using namespace emulation;
  Fiber* f = grid->current;
  size_t n = 0;
  while (n < f->copies.size() && f->copies[n].group < f->copy_groups - kPending) {
    perform(f->copies[n++]);
  }
  f->copies.erase(f->copies.begin(), f->copies.begin() + static_cast<std::ptrdiff_t>(n));
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  emulation::load_matrices(r, smem_row, false, "ldmatrix_x4");
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  emulation::load_matrices(r, smem_row, true, "ldmatrix_x4_trans");
}

// D (16, 8) += A (16, 16) B (16, 8), fp32 accumulation.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma_m16n8k16<T>(d, a, b0, b1);
}

}  // namespace mamba2::ptx
