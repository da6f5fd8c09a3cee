// What the norm's kernels share: which rows and channels a block has, sums over a block.
//
// A block takes one group of channels and some consecutive rows (tokens). In vectors: a thread
// holds kVectors x 16 bytes of a row's group, whose next row is on its way while this one is
// reduced; the weights lie in shared memory, each thread's own.
#pragma once
#include "../core/activations.cuh"
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "formulas.cuh"
#include "gated_rmsnorm.h"

namespace mamba2::gated_rmsnorm {

constexpr int kMaxVectors = 4;
// Threads, at most, for so many vectors each, and blocks an SM that registers must allow: one loads
// while another reduces. 3 vectors by 224 threads are the 5376 channels (bf16) of a 2.7B mixer's
// convolution, and hold its norm's 5120.
constexpr int max_threads(int vectors) { return vectors == 4 ? 352 : vectors == 3 ? 224 : 256; }
constexpr int min_blocks(int vectors) { return vectors == 4 ? 1 : 2; }
constexpr int kAnyThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// A block's share of the rows.
struct RowRange {
  int group;
  int64_t part, first, last;
};
MAMBA2_DEVICE RowRange rows_of_block(const Inputs& in, int rows_per_block) {
  const int groups = in.d / in.s;
  const int64_t rows = in.b * in.l, part = blockIdx.x / groups, first = part * rows_per_block;
  const int64_t last = first + rows_per_block;
  return {static_cast<int>(blockIdx.x % groups), part, first, last < rows ? last : rows};
}
MAMBA2_DEVICE int64_t at_row(int64_t b, int64_t l, const Inputs& in, int64_t row) {
  return row / in.l * b + row % in.l * l;
}

template <class U>
struct Sums {
  U of[2][2][32];  // (parity of the row, which sum, warp)
};

// Sums over the block of kCount values a thread, in a fixed order. Rows take turns with two
// buffers, so that one barrier a row is enough.
template <int kCount, class U>
MAMBA2_DEVICE void sum_over_block(U (&v)[kCount], Sums<U>& sums, int parity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    MAMBA2_UNROLL
    for (int step = 16; step > 0; step /= 2) v[i] += __shfl_xor_sync(kAllLanes, v[i], step);
    if (lane == 0) sums.of[parity][i][warp] = v[i];
  }
  __syncthreads();
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    U sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += sums.of[parity][i][w];
    v[i] = sum;
  }
}

template <class U>
MAMBA2_DEVICE U inverse_rms(U sum_of_squares, const Inputs& in) {
  return U(1) / U(sqrt(sum_of_squares / U(in.s) + U(in.eps)));
}
template <class U>
MAMBA2_DEVICE Gate<U> gate_of_z(const Inputs& in, U z) {
  return gate_of(fast::silu(z), fast::silu_gradient(z), in.z.ptr != nullptr, in.norm_before_gate);
}

// The vectors of one thread.
template <class T, int kVectors>
struct Columns {
  static constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  using Row = Packed<T, kVec>[kVectors];
  int first, s;  // the group's first channel, and its channels

  MAMBA2_DEVICE int at(int v) const {
    return static_cast<int>(v * blockDim.x + threadIdx.x) * kVec;
  }
  MAMBA2_DEVICE bool has(int v) const { return at(v) < s; }
  MAMBA2_DEVICE void load(const void* ptr, int64_t row_at, Row& row) const {
    const T* g_row = static_cast<const T*>(ptr) + row_at + first;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v].zero();
      if (has(v)) row[v].load(g_row + at(v));
    }
  }
  // The thread's own weights: nobody waits for them.
  MAMBA2_DEVICE void load_weights(const AnyFloat& weight, float* s_weight) const {
    for (int v = 0; v < kVectors; ++v) {
      if (!has(v)) continue;
      for (int c = 0; c < kVec; ++c) {
        s_weight[at(v) + c] = mamba2::load<float>(weight, first + at(v) + c);
      }
    }
  }
};

// Vectors of a thread, and threads, for a group of s channels; 0 threads: no block holds it,
// or rows that are no whole number of vectors.
struct BlockShape {
  int vectors = 0, threads = 0;
};
inline BlockShape block_shape(const Inputs& in) {
  const int64_t bytes = int64_t(in.s) * int64_t(size_of(in.dtype));
  if (in.dtype == DType::f64 || bytes % kVectorBytes != 0) return {};
  const int64_t all = bytes / kVectorBytes;
  for (int vectors = 1; vectors <= kMaxVectors; ++vectors) {
    const int64_t threads = round_up(ceil_div(all, vectors), 32);
    if (threads <= max_threads(vectors)) return {vectors, static_cast<int>(threads)};
  }
  return {};
}

// f(TypeTag<T>{}, vectors) for the vectors of a thread at compile time.
template <class F>
int with_vectors(DType dtype, int vectors, F f) {
  const auto run = [&](auto tag) {
    if (vectors == 1) return f(tag, std::integral_constant<int, 1>{});
    if (vectors == 2) return f(tag, std::integral_constant<int, 2>{});
    if (vectors == 3) return f(tag, std::integral_constant<int, 3>{});
    return f(tag, std::integral_constant<int, 4>{});
  };
  if (dtype == DType::f32) return run(TypeTag<float>{});
  if (dtype == DType::bf16) return run(TypeTag<bf16>{});
  return run(TypeTag<f16>{});
}

}  // namespace mamba2::gated_rmsnorm
