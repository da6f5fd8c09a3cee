// What products of a decoding step's rows with weights share: which part of one a block makes, and
// how its warps multiply. A block has 64 rows, kOutputs outputs and a run of the channels, and
// takes these in chunks through a ring in shared memory, whose first weights can be on their way
// before the rows are made.
#pragma once
#include "../core/vectors.cuh"
#include "../tile/sm80.cuh"
#include "norm_linear.h"
#include "row_product.h"

namespace mamba2::norm_linear {

using T = bf16;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kVec = tile::kUnit;  // channels of a copy
constexpr unsigned kAllLanes = 0xffffffffu;

// Grid: (tiles of outputs, ..., tiles of rows).
struct Part {
  int64_t first_row;
  int rows, first_output;
  int first_k, last_k;

  MAMBA2_DEVICE Part(const Params& params, int outputs, int first_k, int channels)
      : first_row(int64_t(blockIdx.z) * kRows),
        rows(params.b - first_row < kRows ? static_cast<int>(params.b - first_row) : kRows),
        first_output(static_cast<int>(blockIdx.x) * outputs),
        first_k(first_k),
        last_k(first_k + channels < params.d ? first_k + channels : params.d) {}
  MAMBA2_DEVICE int chunks(int channels) const { return ceil_div(last_k - first_k, channels); }

  // Begin to copy a tile whose first channel is the part's k-th; zeros where there is nothing.
  template <class Tile>
  MAMBA2_DEVICE void request_weight(const Params& params, int k, Tile& tile) const {
    const T* g_weight = static_cast<const T*>(params.weight) + first_k + k;
    tile::copy_async<kThreads>(tile, g_weight + int64_t(first_output) * params.d, params.d,
                               params.o - first_output, last_k - first_k - k);
  }
  template <class Tile>
  MAMBA2_DEVICE void request_rows(const Matrix& from, int k, Tile& tile) const {
    const T* g_rows = static_cast<const T*>(from.ptr) + first_row * from.stride + first_k + k;
    tile::copy_async<kThreads>(tile, g_rows, from.stride, rows, last_k - first_k - k);
  }
};

// A warp's sums: 16 of the block's rows, and half of its outputs.
template <int kOutputs>
struct WarpSums {
  static constexpr int kRowWarps = kRows / 16;
  static constexpr int kTiles = kOutputs / (kWarps / kRowWarps) / 8;
  static_assert(kTiles % 2 == 0 && kWarps / kRowWarps * kTiles * 8 == kOutputs, "whole warps");
  float sums[kTiles][4] = {};
  int row = static_cast<int>(threadIdx.x) / 32 % kRowWarps * 16;
  int output = static_cast<int>(threadIdx.x) / 32 / kRowWarps * kTiles * 8;

  template <class RowTile, class WeightTile>
  MAMBA2_DEVICE void multiply(const RowTile& s_rows, const WeightTile& s_weight) {
    MAMBA2_UNROLL
    for (int k = 0; k < RowTile::kCols; k += 16) {
      uint32_t a[4];
      tile::load_a(a, s_rows, row, k);
      MAMBA2_UNROLL
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t b[4];
        tile::load_b(b, s_weight, output + i * 8, k);
        tile::mma_16x16<T>(sums[i], sums[i + 1], a, b);
      }
    }
  }
  // A thread's sums are those of kPairs pairs of neighbouring outputs: f(i, row, output) of pair i,
  // counted in the block's.
  static constexpr int kPairs = 2 * kTiles;
  template <class F>
  static MAMBA2_DEVICE void for_places(F f) {
    const WarpSums at;
    MAMBA2_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      f(i, at.row + i % 2 * 8 + tile::fragment_row(), at.output + i / 2 * 8 + tile::fragment_col());
    }
  }
  MAMBA2_DEVICE const float (&pair(int i) const)[2] {
    return reinterpret_cast<const float (&)[2]>(sums[i / 2][i % 2 * 2]);
  }
};

// Whether rows begin at multiples of 16 bytes.
inline bool is_aligned(const Matrix& rows, std::size_t element_bytes) {
  return reinterpret_cast<uintptr_t>(rows.ptr) % kVectorBytes == 0 &&
         rows.stride * int64_t(element_bytes) % kVectorBytes == 0;
}

}  // namespace mamba2::norm_linear
