// Matrix products of tier any: a 64 x 64 tile by the 256 threads of a block, in fp32 or fp64.
//   tile(r, c) += sum_k a(r, k) b(c, k)
// Operands are functions of (index, k) that return 0 outside their matrix, so that ragged sizes
// need no case of their own; they are staged through shared memory in slabs of a few k.
#pragma once
#include "../core/convert.cuh"
#include "../ptx/common.cuh"

namespace mamba2::ssd::any {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // rows and columns of a tile
constexpr int kOwn = 4;    // a thread owns rows t / 16 + 16 m and columns t % 16 + 16 m, m < kOwn

// k staged at a time: 64 bytes of a row, two sectors of memory.
template <class U>
constexpr int kSlab = 64 / sizeof(U);

// Blocks that share an SM: what is left of its registers for a thread is 128 for fp32, 255 for
// fp64.
template <class U>
constexpr int kBlocksPerSm = sizeof(U) == 4 ? 2 : 1;

// A matrix in memory, k contiguous: rows x[i], of which `count` rows and `width` columns exist.
template <class T>
struct Rows {
  using U = accumulator_t<T>;
  static constexpr bool k_contiguous = true;
  const T* first = nullptr;
  int64_t stride = 0;
  int count = 0, width = 0;

  MAMBA2_DEVICE U operator()(int i, int k) const {
    return i < count && k < width ? convert<U>(first[i * stride + k]) : U(0);
  }
  MAMBA2_DEVICE Rows from_row(int i) const {
    return {first + i * stride, stride, count - i, width};
  }
  MAMBA2_DEVICE Rows from_column(int k) const { return {first + k, stride, count, width - k}; }
};

// A tile that lies in shared memory.
template <class U>
struct SharedTile {
  static constexpr bool k_contiguous = true;
  const U (*tile)[kTile + 1];
  MAMBA2_DEVICE U operator()(int i, int k) const { return tile[i][k]; }
};

template <class M>
struct Transposed {
  static constexpr bool k_contiguous = !M::k_contiguous;
  M m;
  MAMBA2_DEVICE auto operator()(int i, int k) const { return m(k, i); }
};
template <class M>
MAMBA2_DEVICE Transposed<M> transposed(const M& m) {
  return {m};
}

// weight[i] m(i, k)
template <class M, class U>
struct Scaled {
  static constexpr bool k_contiguous = M::k_contiguous;
  M m;
  const U* weight;
  MAMBA2_DEVICE U operator()(int i, int k) const { return weight[i] * m(i, k); }
};
template <class M, class U>
MAMBA2_DEVICE Scaled<M, U> scaled(const M& m, const U* weight) {
  return {m, weight};
}

// The part of a 64 x 64 tile that one thread owns.
template <class U>
struct Tile {
  U v[kOwn][kOwn] = {};
  static MAMBA2_DEVICE int row(int m) { return int(threadIdx.x) / 16 + 16 * m; }
  static MAMBA2_DEVICE int column(int m) { return int(threadIdx.x) % 16 + 16 * m; }

  // f(row, column, value) on every element.
  template <class F>
  MAMBA2_DEVICE void each(F f) {
    MAMBA2_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      MAMBA2_UNROLL
      for (int j = 0; j < kOwn; ++j) f(row(i), column(j), v[i][j]);
    }
  }
  // f(row, column, value, the other tile's value) on every element.
  template <class F>
  MAMBA2_DEVICE void with(const Tile& other, F f) {
    MAMBA2_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      MAMBA2_UNROLL
      for (int j = 0; j < kOwn; ++j) f(row(i), column(j), v[i][j], other.v[i][j]);
    }
  }
  // sums[row] += sum over columns of f(row, column, value), in a fixed order.
  template <class F>
  MAMBA2_DEVICE void add_row_sums(U* sums, F f) const {
    MAMBA2_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      U sum = 0;
      MAMBA2_UNROLL
      for (int j = 0; j < kOwn; ++j) sum += f(row(i), column(j), v[i][j]);
      MAMBA2_UNROLL
      for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (threadIdx.x % 16 == 0) sums[row(i)] += sum;
    }
  }
};

template <class U>
struct Slabs {
  U a[kSlab<U>][kTile + 1];
  U b[kSlab<U>][kTile + 1];
};

// A thread's share of one slab of one operand, on its way from memory.
template <class U>
struct Fetched {
  U v[kSlab<U> * kTile / kThreads];

  // f(k, index, value) on every element; neighbouring threads are neighbours in the matrix's
  // memory.
  template <bool k_contiguous, class F>
  MAMBA2_DEVICE void each(F f) {
    MAMBA2_UNROLL
    for (int m = 0; m < kSlab<U> * kTile / kThreads; ++m) {
      const int e = int(threadIdx.x) + m * kThreads;
      if (k_contiguous) {
        f(e % kSlab<U>, e / kSlab<U>, v[m]);
      } else {
        f(e / kTile, e % kTile, v[m]);
      }
    }
  }
  template <class M>
  MAMBA2_DEVICE void fetch(const M& matrix, int k0) {
    each<M::k_contiguous>([&](int k, int i, U& element) { element = matrix(i, k0 + k); });
  }
  template <class M>
  MAMBA2_DEVICE void store(const M&, U (&s_slab)[kSlab<U>][kTile + 1]) {
    each<M::k_contiguous>([&](int k, int i, U element) { s_slab[k][i] = element; });
  }
};

template <class U>
MAMBA2_DEVICE void multiply_slabs(Tile<U>& acc, const Slabs<U>& s) {
  constexpr int kAtOnce = sizeof(U) == 4 ? 4 : 2;  // more would hide no more, and cost registers
  MAMBA2_NO_UNROLL
  for (int k0 = 0; k0 < kSlab<U>; k0 += kAtOnce) {
    MAMBA2_UNROLL
    for (int k = k0; k < k0 + kAtOnce; ++k) {
      U r_a[kOwn], r_b[kOwn];
      MAMBA2_UNROLL
      for (int m = 0; m < kOwn; ++m) {
        r_a[m] = s.a[k][acc.row(m)];
        r_b[m] = s.b[k][acc.column(m)];
      }
      MAMBA2_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        MAMBA2_UNROLL
        for (int j = 0; j < kOwn; ++j) acc.v[i][j] += r_a[i] * r_b[j];
      }
    }
  }
}

// Starts with a barrier: what other threads of the block wrote to shared memory before is seen.
// The next slab is on its way while this one is multiplied.
template <class U, class A, class B>
MAMBA2_DEVICE void matmul(Tile<U>& acc, Slabs<U>& s, int k_count, const A& a, const B& b) {
  Fetched<U> next_a, next_b;
  __syncthreads();
  next_a.fetch(a, 0);
  next_b.fetch(b, 0);
  MAMBA2_NO_UNROLL
  for (int k0 = 0; k0 < k_count; k0 += kSlab<U>) {
    if (k0 > 0) __syncthreads();  // the last slab has been read
    next_a.store(a, s.a);
    next_b.store(b, s.b);
    __syncthreads();
    if (k0 + kSlab<U> < k_count) {
      next_a.fetch(a, k0 + kSlab<U>);
      next_b.fetch(b, k0 + kSlab<U>);
    }
    multiply_slabs(acc, s);
  }
}

// The sum of `value` over the block, known to every thread; the same bits every time.
template <class U>
MAMBA2_DEVICE U block_sum(U value, U (&s_warps)[kThreads / 32]) {
  MAMBA2_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) s_warps[threadIdx.x / 32] = value;
  __syncthreads();
  U sum = 0;
  MAMBA2_UNROLL
  for (int w = 0; w < kThreads / 32; ++w) sum += s_warps[w];
  return sum;
}

}  // namespace mamba2::ssd::any
