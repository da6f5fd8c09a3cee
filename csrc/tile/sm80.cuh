// Products of 16-bit tiles by mma.sync.m16n8k16, fp32 accumulation: fragments and who owns what.
//
// Accumulator of a (16, 8) tile, float[4]: lane owns rows r, r + 8 with r = lane / 4 and columns
// c, c + 1 with c = 2 (lane % 4), as {(r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)}.
// Two adjacent tiles, (16, 16), have the layout of an A fragment once rounded in pairs: pack_a.
#pragma once
#include "../core/convert.cuh"
#include "shared_tile.cuh"

namespace mamba2::tile {

// (Masks and shifts, not % and /: on signed numbers those cost registers that kernels lack.)
MAMBA2_DEVICE int lane() { return threadIdx.x & 31; }
MAMBA2_DEVICE int fragment_row() { return lane() >> 2; }
MAMBA2_DEVICE int fragment_col() { return (lane() & 3) << 1; }

// Rows and units that the lanes of ldmatrix.x4 address: matrices 0, 1 stacked along the rows, 2, 3
// to their right; or 0, 1 side by side, 2, 3 below.
MAMBA2_DEVICE int stacked_row() { return lane() & 15; }
MAMBA2_DEVICE int stacked_col() { return (lane() & 16) >> 1; }
MAMBA2_DEVICE int abreast_row() { return (lane() & 7) + ((lane() & 16) >> 1); }
MAMBA2_DEVICE int abreast_col() { return lane() & 8; }

// A (16 m, 16 k) from a tile that stores [m][k].
template <class Tile>
MAMBA2_DEVICE void load_a(uint32_t (&a)[4], const Tile& tile, int m, int k) {
  ptx::ldmatrix_x4(a, tile.at(m, k, stacked_row(), stacked_col()));
}
// A (16 m, 16 k) from a tile that stores [k][m].
template <class Tile>
MAMBA2_DEVICE void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int k, int m) {
  ptx::ldmatrix_x4_trans(a, tile.at(k, m, abreast_row(), abreast_col()));
}
// B (16 k, 16 n), two fragments, from a tile that stores [n][k].
template <class Tile>
MAMBA2_DEVICE void load_b(uint32_t (&b)[4], const Tile& tile, int n, int k) {
  ptx::ldmatrix_x4(b, tile.at(n, k, abreast_row(), abreast_col()));
}
// B (16 k, 16 n), two fragments, from a tile that stores [k][n].
template <class Tile>
MAMBA2_DEVICE void load_b_transposed(uint32_t (&b)[4], const Tile& tile, int k, int n) {
  ptx::ldmatrix_x4_trans(b, tile.at(k, n, stacked_row(), stacked_col()));
}

// (16, 16) += A (16, 16) B (16, 16): left and right are the accumulators of its two tiles.
template <class T>
MAMBA2_DEVICE void mma_16x16(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[4]) {
  ptx::mma_m16n8k16<T>(left, a, b[0], b[1]);
  ptx::mma_m16n8k16<T>(right, a, b[2], b[3]);
}

// An accumulated (16, 16) as the A operand of the next product.
template <class T>
MAMBA2_DEVICE void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

// A (16 m, 16 k) with column k multiplied by w[k], in fp32, rounded once. w is 8-byte aligned.
template <class T>
MAMBA2_DEVICE void scale_columns(uint32_t (&a)[4], const float* w) {
  const float2 low = *reinterpret_cast<const float2*>(w + fragment_col());
  const float2 high = *reinterpret_cast<const float2*>(w + fragment_col() + 8);
  MAMBA2_UNROLL for (int i = 0; i < 4; ++i) {
    const float2 v = unpack2<T>(a[i]);
    a[i] = i < 2 ? pack2<T>(v.x * low.x, v.y * low.y) : pack2<T>(v.x * high.x, v.y * high.y);
  }
}

// r[j] of lane t of each four lanes becomes r[t] of lane j. Its own inverse.
MAMBA2_DEVICE void quad_transpose(uint32_t (&r)[4]) {
  const bool odd = lane() & 1, upper = lane() & 2;
  MAMBA2_UNROLL for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? r[i] : r[i + 1], 1);
    (odd ? r[i] : r[i + 1]) = got;
  }
  MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? r[i] : r[i + 2], 2);
    (upper ? r[i] : r[i + 2]) = got;
  }
}

// An accumulated (16, 16) as rows of 16-byte units, which is how it meets global memory: this lane
// has the eight columns from unit_col() of row unit_row().
// (laneid, read anew, keeps no register from the products to the store.)
MAMBA2_DEVICE int unit_row() {
  const int lane = ptx::laneid();
  return (lane >> 2) + (lane & 2) * 4;
}
MAMBA2_DEVICE int unit_col() { return (ptx::laneid() & 1) * kUnit; }

template <class T>
MAMBA2_DEVICE uint4 to_unit(const float (&left)[4], const float (&right)[4]) {
  uint32_t r[4] = {pack2<T>(left[0], left[1]), pack2<T>(right[0], right[1]),
                   pack2<T>(left[2], left[3]), pack2<T>(right[2], right[3])};
  quad_transpose(r);
  return {r[0], r[1], r[2], r[3]};
}
// The same of what these lose by being rounded.
template <class T>
MAMBA2_DEVICE uint4 to_rest_unit(const float (&left)[4], const float (&right)[4]) {
  float rests[2][4];
  MAMBA2_UNROLL for (int i = 0; i < 4; i += 2) {
    const float2 l = unpack2<T>(pack2<T>(left[i], left[i + 1]));
    const float2 r = unpack2<T>(pack2<T>(right[i], right[i + 1]));
    rests[0][i] = left[i] - l.x, rests[0][i + 1] = left[i + 1] - l.y;
    rests[1][i] = right[i] - r.x, rests[1][i + 1] = right[i + 1] - r.y;
  }
  return to_unit<T>(rests[0], rests[1]);
}
template <class T>
MAMBA2_DEVICE void from_unit(float (&left)[4], float (&right)[4], uint4 unit) {
  uint32_t r[4] = {unit.x, unit.y, unit.z, unit.w};
  quad_transpose(r);
  MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
    const float2 of_left = unpack2<T>(r[2 * i]), of_right = unpack2<T>(r[2 * i + 1]);
    left[2 * i] = of_left.x, left[2 * i + 1] = of_left.y;
    right[2 * i] = of_right.x, right[2 * i + 1] = of_right.y;
  }
}

}  // namespace mamba2::tile
