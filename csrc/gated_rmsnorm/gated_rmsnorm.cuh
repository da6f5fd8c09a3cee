// What the norm's kernels share: which rows and channels a block has, how rows come to it, sums
// over a block.
//
// A block takes one group of channels and a run of rows (tokens); all blocks of a grid are on the
// card at the same time and end together. In vectors: a thread holds kVectors x 16 bytes of a row's
// group, their weights and what it sums over rows in registers; the next row is on its way into
// shared memory while this one is reduced. A thread reads there what it copied itself.
#pragma once
#include "../core/activations.cuh"
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "../ptx/sm80.cuh"
#include "formulas.cuh"
#include "gated_rmsnorm.h"

namespace mamba2::gated_rmsnorm {

constexpr int kMaxVectors = 4;
// Threads, at most, for so many vectors each, and blocks an SM that registers must allow: one loads
// while another reduces. 3 vectors by 224 threads are the 5376 channels (bf16) of a 2.7B mixer's
// convolution, and hold its norm's 5120.
constexpr int max_threads(int vectors) { return vectors == 4 ? 352 : vectors == 3 ? 224 : 256; }
constexpr int min_blocks(int vectors) { return vectors == 4 ? 1 : vectors == 1 ? 3 : 2; }
constexpr int kAnyThreads = 256;
constexpr int kMaxWarps = 12;
constexpr int kSms = 132;  // of an H100 or H200, whatever the card: results must not depend on it
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
// Where a row lies, found from the row before it without a division.
struct RowCursor {
  int64_t i_b, i_l;

  MAMBA2_DEVICE RowCursor(const Inputs& in, int64_t row) : i_b(row / in.l), i_l(row % in.l) {}
  MAMBA2_DEVICE void advance(const Inputs& in) {
    if (++i_l < in.l) return;
    i_l = 0;
    ++i_b;
  }
  MAMBA2_DEVICE int64_t at(int64_t b, int64_t l) const { return i_b * b + i_l * l; }
};

template <class U>
struct alignas(16) Sums {
  U of[2][2][kMaxWarps];  // (parity of the row, which sum, warp)

  // For warps that the block does not have; seen by others at the next barrier.
  MAMBA2_DEVICE void clear_missing() {
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int i = threadIdx.x; i < 4 * kMaxWarps; i += static_cast<int>(blockDim.x)) {
      if (i % kMaxWarps >= warps) of[i / kMaxWarps / 2][i / kMaxWarps % 2][i % kMaxWarps] = 0;
    }
  }
};

// Sums over the block of kCount values a thread, in a fixed order. Rows take turns with two
// buffers, so that one barrier a row is enough.
template <int kCount, class U>
MAMBA2_DEVICE void sum_over_block(U (&v)[kCount], Sums<U>& sums, int parity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], step);
  }
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (lane == 0) sums.of[parity][i][warp] = v[i];
  }
  __syncthreads();
  MAMBA2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    U sum = 0;
    MAMBA2_UNROLL
    for (int w = 0; w < kMaxWarps; ++w) sum += sums.of[parity][i][w];
    v[i] = sum;
  }
}

template <class U>
MAMBA2_DEVICE U inverse_rms(U sum_of_squares, U inverse_s, const Inputs& in) {
  return U(1) / U(sqrt(sum_of_squares * inverse_s + U(in.eps)));
}

// The vectors of one thread.
template <class T, int kVectors>
struct Columns {
  static constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  int first, s;  // the group's first channel, and its channels

  MAMBA2_DEVICE int at(int v) const {
    return static_cast<int>(v * blockDim.x + threadIdx.x) * kVec;
  }
  MAMBA2_DEVICE bool has(int v) const { return at(v) < s; }
  MAMBA2_DEVICE void load(const AnyFloat& from, float (&to)[kVectors][kVec]) const {
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) to[v][c] = 0;
      if (has(v)) load_any(from, first + at(v), to[v]);
    }
  }
};

// A thread's vectors of kArrays arrays, of this row and the next.
template <class T, int kVectors, int kArrays>
struct Ring {
  using C = Columns<T, kVectors>;
  using Vector = Packed<T, C::kVec>;
  static constexpr int kRows = 2;
  char* s_vectors;  // (kRows, kArrays, kVectors, threads) 16 bytes

  static constexpr std::size_t bytes(int threads) {
    return std::size_t(kRows) * kArrays * kVectors * threads * kVectorBytes;
  }
  MAMBA2_DEVICE char* at(int64_t row, int array, int v) const {
    const int which = (static_cast<int>(row % kRows) * kArrays + array) * kVectors + v;
    return s_vectors + static_cast<int>(which * blockDim.x + threadIdx.x) * kVectorBytes;
  }
  MAMBA2_DEVICE void load(int64_t row, int array, const void* ptr, int64_t row_at,
                          const C& columns) const {
    const T* g_row = static_cast<const T*>(ptr) + row_at + columns.first;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      ptx::cp_async_16(at(row, array, v), g_row + columns.at(v), columns.has(v));
    }
  }
  MAMBA2_DEVICE void read(int64_t row, int array, int v, float (&to)[C::kVec]) const {
    load_vector(reinterpret_cast<const T*>(at(row, array, v)), to);
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
// So many that the card runs all blocks at once.
inline int rows_per_block(const Inputs& in) {
  const BlockShape shape = block_shape(in);
  int64_t blocks = 4 * kSms;
  if (shape.threads > 0) {
    blocks = kSms * min_blocks(shape.vectors) * (max_threads(shape.vectors) / shape.threads);
  }
  const int64_t rows = ceil_div(in.b * in.l * (in.d / in.s), blocks);
  return rows > 0 ? static_cast<int>(rows) : 1;
}
inline int64_t parts_of(const Inputs& in) { return ceil_div(in.b * in.l, rows_per_block(in)); }

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
