// What the kernels for many rows share: which channels of which rows a thread has, and sums over a
// row.
//
// A row belongs to a team of 1, 2, 4 or 8 warps, as few as hold it: a thread has up to 6 vectors of
// 4 channels, so that one warp holds 768. A block of 8 warps takes a run of rows, as many of them
// at a time as it has teams, and all blocks are on the card at once: weights are read, and their
// gradients kept, in registers. A warp alone needs no barrier; the others one a row.
#pragma once
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "../gated_rmsnorm/formulas.cuh"
#include "add_norm.h"

namespace mamba2::add_norm {

constexpr int kVec = 4;  // channels of an access: 16 bytes of fp32, 8 of a 16-bit type
constexpr int kVectors = 6;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kAnyThreads = 256;
constexpr int kSms = 132;  // of an H100 or H200, whatever the card: results must not depend on it
constexpr int kMaxChannels = kThreads * kVectors * kVec;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Team {
  int threads, index, thread;  // its threads, which team of the block it is, which thread of it
  int d;

  MAMBA2_DEVICE Team(int warps, int d)
      : threads(32 * warps),
        index(static_cast<int>(threadIdx.x) / threads),
        thread(static_cast<int>(threadIdx.x) % threads),
        d(d) {}
  MAMBA2_DEVICE int at(int v) const { return (v * threads + thread) * kVec; }
  MAMBA2_DEVICE bool has(int v) const { return at(v) < d; }
  MAMBA2_DEVICE int count() const { return kThreads / threads; }

  // A row's vectors, and zeros where `has` says no or there is no such row.
  template <class T>
  MAMBA2_DEVICE void load(const T* g_row, bool here, Packed<T, kVec> (&to)[kVectors]) const {
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (here && has(v)) {
        to[v].load(g_row + at(v));
      } else {
        to[v].zero();
      }
    }
  }
  MAMBA2_DEVICE void load_weight(const AnyFloat& from, float (&to)[kVectors][kVec]) const {
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) to[v][c] = 0;
      if (has(v)) load_any(from, at(v), to[v]);
    }
  }
};

// Sums of kCount values a thread over its team, in a fixed order. s_sums (2, kCount, kWarps): rows
// take turns with the two halves, so that one barrier a row is enough. All threads must come.
template <int kCount>
MAMBA2_DEVICE void sum_over_team(float (&v)[kCount], float* s_sums, const Team& team, int parity) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], step);
  }
  if (team.threads == 32) return;
  const int warps = team.threads / 32;
  float* s_of_row = s_sums + parity * kCount * kWarps;
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (threadIdx.x % 32 == 0) s_of_row[i * kWarps + threadIdx.x / 32] = v[i];
  }
  __syncthreads();
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    v[i] = 0;
    for (int w = 0; w < warps; ++w) v[i] += s_of_row[i * kWarps + team.index * warps + w];
  }
}

// The sum over the block of a value a thread, in a fixed order. s_sums: one a warp.
template <class U>
MAMBA2_DEVICE U sum_over_block(U v, U* s_sums) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  if (threadIdx.x % 32 == 0) s_sums[threadIdx.x / 32] = v;
  __syncthreads();
  U sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += s_sums[w];
  return sum;
}

template <class U>
MAMBA2_DEVICE U inverse_rms(U sum_of_squares, int d, double eps) {
  return U(1) / U(sqrt(sum_of_squares / U(d) + U(eps)));
}

inline int warps_of_team(int d) {
  int warps = 1;
  while (warps * 32 * kVectors * kVec < d) warps *= 2;
  return warps;
}
// So many rows a block that `blocks` of them take all.
inline int64_t rows_of_each(int64_t rows, int64_t blocks) {
  return rows > blocks ? ceil_div(rows, blocks) : 1;
}

// Whether the rows of an array (of one that is absent, too) are made of whole, aligned vectors.
inline bool has_vectors(const void* ptr, DType dtype, int64_t stride) {
  const auto bytes = size_of(dtype) * kVec;
  return reinterpret_cast<uintptr_t>(ptr) % bytes == 0 && stride % kVec == 0;
}

// f(TypeTag<T>{}) for the type of x and y.
template <class F>
int with_row_type(DType dtype, F f) {
  if (dtype == DType::f32) return f(TypeTag<float>{});
  if (dtype == DType::bf16) return f(TypeTag<bf16>{});
  return f(TypeTag<f16>{});
}

}  // namespace mamba2::add_norm
