// A (kRows, kCols) tile of 16-bit elements in shared memory, laid out so that 16-byte units of
// eight consecutive rows in one column fall in different banks: ldmatrix, which reads just that,
// then takes one pass. Rows of a multiple of 128 bytes have their units exchanged (unit ^= row %
// 8); other widths have one unit of padding, which makes the row stride an odd number of units.
#pragma once
#include "../ptx/sm80.cuh"

namespace mamba2::tile {

constexpr int kUnit = 8;  // elements of 16 bytes

template <class Element, int rows, int cols>
struct alignas(128) SharedTile {
  using T = Element;
  static constexpr int kRows = rows, kCols = cols, kUnits = cols / kUnit;
  static constexpr bool kSwizzled = kUnits % 8 == 0;
  static constexpr int kStride = kUnit * (kSwizzled ? kUnits : kUnits + 1);
  static_assert(cols % 16 == 0, "an even number of units");

  T data[rows * kStride];

  MAMBA2_DEVICE T* at(int row, int col) {
    const int unit = col >> 3, within = col & 7;
    return data + row * kStride + (kSwizzled ? unit ^ (row & 7) : unit) * kUnit + within;
  }
  MAMBA2_DEVICE const T* at(int row, int col) const {
    return const_cast<SharedTile*>(this)->at(row, col);
  }
  // at(row + lane_row, col + lane_col), for row a multiple of 8, col of 16 and lane_col of 0 or 8:
  // a lane's part of the address is then computed once, and one instruction adds the rest.
  MAMBA2_DEVICE const T* at(int row, int col, int lane_row, int lane_col) const {
    const int lane_index = static_cast<int>(at(lane_row, lane_col) - data);
    return data + row * kStride + (kSwizzled ? lane_index ^ col : lane_index + col);
  }
};

// Starts copying rows from global memory, `stride` elements apart and 16-byte aligned. What lies
// beyond valid_rows or valid_cols (a multiple of 8) becomes zero and is not read.
template <int kThreads, class Tile>
MAMBA2_DEVICE void copy_async(Tile& tile, const typename Tile::T* g, int64_t stride, int valid_rows,
                              int valid_cols) {
  // A thread keeps its column and its swizzle, so that every address is one step from the last.
  constexpr int kRowsAtOnce = kThreads / Tile::kUnits;
  constexpr int kRowsPerPass = Tile::kSwizzled ? kRowsAtOnce / 8 * 8 : kRowsAtOnce;
  const int thread = (threadIdx.x & ~31) | ptx::laneid();  // anew: kept, it would cost registers
  const int row = thread / Tile::kUnits, col = thread % Tile::kUnits * kUnit;
  if (kRowsPerPass * Tile::kUnits != kThreads && row >= kRowsPerPass) return;
  g += row * stride + col;
  typename Tile::T* s = tile.at(row, col);
  if (col >= valid_cols) valid_rows = 0;
  MAMBA2_UNROLL for (int pass = 0; pass < Tile::kRows; pass += kRowsPerPass) {
    if (Tile::kRows % kRowsPerPass != 0 && row + pass >= Tile::kRows) break;
    ptx::cp_async_16(s + pass * Tile::kStride, g, row + pass < valid_rows);
    g += kRowsPerPass * stride;
  }
}

}  // namespace mamba2::tile
