// What the kernels of the sm_80 backward share beside the tile layer.
#pragma once
#include "../tile/sm80.cuh"
#include "scan_backward_sm80.h"

namespace mamba2::ssd::sm80 {

// A tile of any number of columns: panels of 64, one after another.
template <class T, int kRows>
struct Panels {
  using Panel = tile::SharedTile<T, kRows, 64>;
  Panel* panel;
  MAMBA2_DEVICE T* at(int row, int col) const { return panel[col >> 6].at(row, col & 63); }
  // As SharedTile's: col is a multiple of 16, lane_col 0 or 8.
  MAMBA2_DEVICE const T* at(int row, int col, int lane_row, int lane_col) const {
    const Panel& of_col = panel[col >> 6];
    return of_col.at(row, col & 63, lane_row, lane_col);
  }
  static constexpr int bytes(int panels) { return panels * int(sizeof(Panel)); }

  // Starts copying rows from global memory; zeros beyond `rows` and `cols`. Rolled loops: unrolled
  // ones would keep an address per copy in registers from head to head.
  template <int kThreads>
  MAMBA2_DEVICE void copy_async(int panels, const T* g, int64_t stride, int rows, int cols) const {
    const int first_row = threadIdx.x / 8;
    MAMBA2_NO_UNROLL for (int i = 0; i < panels; ++i) {
      const int col = 64 * i + threadIdx.x % 8 * 8;
      const T* from = g + first_row * stride + col;
      MAMBA2_NO_UNROLL for (int row = first_row; row < kRows; row += kThreads / 8) {
        const bool valid = row < rows && col < cols;
        ptx::cp_async_16(at(row, col), valid ? from : g, valid);
        from += kThreads / 8 * stride;
      }
    }
  }
};

// Row of the chunk's first token of tensor t, head or group i.
template <class T>
MAMBA2_DEVICE const T* rows_of(const Strided& t, const Chunk& chunk, int i) {
  return static_cast<const T*>(t.ptr) + int64_t(chunk.row) * t.b + int64_t(chunk.token) * t.l +
         int64_t(i) * t.h;
}

// Sums over the four lanes that share the rows of a fragment, and over the warp.
MAMBA2_DEVICE float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

MAMBA2_DEVICE float warp_sum(float v) {
  MAMBA2_UNROLL for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

}  // namespace mamba2::ssd::sm80
