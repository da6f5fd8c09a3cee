// What fused_scan (sm_90a) keeps for the backward: every state that enters one of the backward's
// chunks, rounded, as the image that its kernels copy into shared memory (scan_backward_sm90.cuh).
#pragma once
#include "../tile/sm80.cuh"
#include "../tile/sm90.cuh"

namespace mamba2::ssd::sm90 {

constexpr int kKeptQ = 128;  // tokens a chunk of the backward: two of fused_scan's

// The image of a state (64 p, n) from its A fragments, which fused_scan has for S C^T: n / 64
// panels of [p][64 n], swizzled. Four lanes exchange what they have of a row's 32 columns, so that
// each stores a unit of 16 bytes.
template <class T, int kN>
MAMBA2_DEVICE void keep_state(T* image, const uint32_t (&S)[kN / 4], const tile::Lane& me) {
  constexpr int kRow = tile::kPanelColumns, kPanel = 64 * kRow, kUnit = 8;
  const int place = (me.lane % 4) ^ (me.lane / 4);  // of this lane's unit: swizzled by row % 8
  T* const rows = image + me.row(0) * kRow;
  MAMBA2_UNROLL
  for (int k = 0; k < kN / 32; ++k) {
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t* from = S + 8 * k + half;
      uint32_t r[4] = {from[0], from[2], from[4], from[6]};
      tile::quad_transpose(r);
      T* to = rows + k / 2 * kPanel + half * 8 * kRow + (place ^ k % 2 * 4) * kUnit;
      *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
}

}  // namespace mamba2::ssd::sm90
