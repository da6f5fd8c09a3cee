// One register-blocked kernel, compiled for each instruction set and picked when first called.
#include "matmul_cpu.h"

#if defined(__x86_64__)
#define MAMBA2_TARGET(isa) __attribute__((target(isa)))
#endif
#define MAMBA2_ALWAYS_INLINE inline __attribute__((always_inline))

namespace mamba2::cpu {
namespace {

// `bytes` wide, as the compiler's own vector type: it needs no alignment beyond T's.
template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = bytes / static_cast<int>(sizeof(T));
};

// Rows i .. i + rows, columns j .. j + vectors * lanes: the accumulators stay in registers.
template <class T, int bytes, int rows, int vectors>
MAMBA2_ALWAYS_INLINE void block(const Tile<T>& out, const Left<T>& a, const Tile<T>& b, int i,
                                int j, int depth, T keep) {
  using Vector = typename VectorOf<T, bytes>::type;
  constexpr int lanes = VectorOf<T, bytes>::lanes;
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Vector* old = reinterpret_cast<const Vector*>(out.row(i + r) + j);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      if (keep == T(0)) {
        sum[r][v] = Vector{};
      } else {
        sum[r][v] = old[v] * keep;
      }
    }
  }
  const T* left = a.data + static_cast<long>(i) * a.row;
  for (int k = 0; k < depth; ++k) {
    const Vector* right = reinterpret_cast<const Vector*>(b.row(k) + j);
    Vector r_b[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) r_b[v] = right[v];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const T r_a = left[static_cast<long>(r) * a.row + static_cast<long>(k) * a.column];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += r_b[v] * r_a;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    Vector* to = reinterpret_cast<Vector*>(out.row(i + r) + j);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) to[v] = sum[r][v];
  }
  static_assert(lanes > 0);
}

// Rows in blocks of `rows`, then one by one; columns in pairs of vectors, then one by one.
template <class T, int bytes, int rows>
MAMBA2_ALWAYS_INLINE void matmul_body(const Tile<T>& out, const Left<T>& a, const Tile<T>& b,
                                      Extent e, T keep) {
  constexpr int lanes = VectorOf<T, bytes>::lanes;
  static_assert(kTilePadding % lanes == 0, "a vector must not run past the padding");
  const int columns = padded(e.n);
  int i = 0;
  for (; i + rows <= e.m; i += rows) {
    int j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) {
      block<T, bytes, rows, 2>(out, a, b, i, j, e.k, keep);
    }
    for (; j < columns; j += lanes) block<T, bytes, rows, 1>(out, a, b, i, j, e.k, keep);
  }
  for (; i < e.m; ++i) {
    for (int j = 0; j < columns; j += lanes) block<T, bytes, 1, 1>(out, a, b, i, j, e.k, keep);
  }
}

template <class T>
using Kernel = void (*)(const Tile<T>&, const Left<T>&, const Tile<T>&, Extent, T);

// Accumulators in registers: 16 of 32 with 512 bits, 8 of 16 below; two chains of fused
// multiply-adds per port hide their latency.
#if defined(MAMBA2_TARGET)
template <class T>
MAMBA2_TARGET("avx512f,avx512vl,avx512dq,avx512bw,fma")
void matmul_512(const Tile<T>& out, const Left<T>& a, const Tile<T>& b, Extent e, T keep) {
  matmul_body<T, 64, 8>(out, a, b, e, keep);
}
template <class T>
MAMBA2_TARGET("avx2,fma")
void matmul_256(const Tile<T>& out, const Left<T>& a, const Tile<T>& b, Extent e, T keep) {
  matmul_body<T, 32, 4>(out, a, b, e, keep);
}
#endif
template <class T>
void matmul_128(const Tile<T>& out, const Left<T>& a, const Tile<T>& b, Extent e, T keep) {
  matmul_body<T, 16, 4>(out, a, b, e, keep);
}

template <class T>
Kernel<T> pick() {
#if defined(MAMBA2_TARGET)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    return matmul_512<T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return matmul_256<T>;
#endif
  return matmul_128<T>;
}

}  // namespace

template <class T>
void matmul(Tile<T> out, Left<T> a, Tile<T> b, Extent extent, T keep) {
  static const Kernel<T> kernel = pick<T>();
  kernel(out, a, b, extent, keep);
}
template void matmul(Tile<float>, Left<float>, Tile<float>, Extent, float);
template void matmul(Tile<double>, Left<double>, Tile<double>, Extent, double);

}  // namespace mamba2::cpu
