// Tiles of the sm_90a kernels: who owns which element, and matrix products on tiles.
//
// A panel is kRows x 64 elements of 16 bits, a row being 128 bytes, stored with the 128-byte
// swizzle: the 16-byte unit index is xor-ed with row % 8. TMA writes it so, wgmma reads it so, and
// ldmatrix / stmatrix go through panel_address(). A wider tile is several panels one after another.
//
// An accumulator of a warpgroup (64, N): element e of lane t of warp w is
//   row 16 w + t / 4 + 8 ((e >> 1) & 1), column 8 (e / 4) + 2 (t % 4) + (e & 1).
// Its elements 8s .. 8s + 7, rounded in pairs, are the A fragment of k step s (16 columns).
#pragma once
#include <type_traits>

#include "../core/convert.cuh"
#include "../ptx/sm90.cuh"

namespace mamba2::tile {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kSwizzleAtomBytes = 1024;  // 8 rows
constexpr int kWarpgroup = 128;

template <int kRows>
constexpr int panel_bytes() {
  return kRows * kPanelRowBytes;
}

// Address of the 8 elements from (row, column), column % 8 == 0, column < 64.
MAMBA2_DEVICE void* panel_address(void* panel, int row, int column) {
  return static_cast<char*>(panel) + row * kPanelRowBytes + ((column * 2) ^ ((row & 7) << 4));
}
MAMBA2_DEVICE const void* panel_address(const void* panel, int row, int column) {
  return panel_address(const_cast<void*>(panel), row, column);
}

// A value that all threads of a warp have, said so that the compiler knows: it then lives in
// uniform registers, and branches on it do not diverge.
MAMBA2_DEVICE int uniform(int v) { return __shfl_sync(0xffffffff, v, 0); }

struct Lane {
  int warp, lane;  // warp within its warpgroup
  MAMBA2_DEVICE explicit Lane(int thread) : warp(uniform((thread / 32) % 4)), lane(thread % 32) {}
  MAMBA2_DEVICE int row(int half) const { return 16 * warp + lane / 4 + 8 * half; }
  MAMBA2_DEVICE int column(int block8) const { return 8 * block8 + 2 * (lane % 4); }
};

// ---- operands of wgmma in shared memory ----
// A descriptor some bytes further on. The address is in its low word and cannot carry out of it, so
// that all steps of a product share the arithmetic of the first.
MAMBA2_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}
// Of every kSpacing groups of 8 rows an operand takes one: 2 gives every second group, from the one
// that `tile` points at.
//
// [mn][k]: k contiguous. kPanelRows rows of M or N; panels of 64 k.
template <int kPanelRows, int kSpacing = 1>
struct KMajor {
  static constexpr bool kTranspose = false;
  const void* tile;
  MAMBA2_DEVICE uint64_t at(int k_step) const {
    return advance(ptx::wgmma_descriptor(tile, 16, kSpacing * kSwizzleAtomBytes),
                   k_step / 4 * panel_bytes<kPanelRows>() + k_step % 4 * 32);
  }
};
// [k][mn]: mn contiguous. kPanelRows rows of k; panels of 64 mn.
template <int kPanelRows, int kSpacing = 1>
struct MnMajor {
  static constexpr bool kTranspose = true;
  const void* tile;
  MAMBA2_DEVICE uint64_t at(int k_step) const {
    constexpr uint32_t kGroup = kSpacing * kSwizzleAtomBytes;
    return advance(ptx::wgmma_descriptor(tile, panel_bytes<kPanelRows>(), kGroup),
                   k_step * 2 * kGroup);
  }
};

// D (64, N) (+)= A (64, 16 kSteps) B: issued, not waited for. A in registers (rs) or shared (ss).
template <class T, int N, int kSteps, class BTile>
MAMBA2_DEVICE void product_rs(float (&d)[N / 2], const uint32_t (&a)[4 * kSteps], const BTile& b,
                              bool accumulate) {
  MAMBA2_UNROLL
  for (int s = 0; s < kSteps; ++s)
    ptx::WgmmaRs<T, N, BTile::kTranspose>::run(d, a + 4 * s, b.at(s), accumulate || s > 0);
}
template <class T, int N, int kSteps, class ATile, class BTile>
MAMBA2_DEVICE void product_ss(float (&d)[N / 2], const ATile& a, const BTile& b, bool accumulate) {
  MAMBA2_UNROLL
  for (int s = 0; s < kSteps; ++s)
    ptx::WgmmaSs<T, N, ATile::kTranspose, BTile::kTranspose>::run(d, a.at(s), b.at(s),
                                                                  accumulate || s > 0);
}

// ---- fragments ----
// The first elements of an array of registers.
template <int kFirst, class E, int kAll>
MAMBA2_DEVICE E (&front(E (&r)[kAll])) [kFirst] {
  static_assert(kFirst <= kAll, "no more than there are");
  return reinterpret_cast<E(&)[kFirst]>(r);
}
// A panel holds a tile [k][m] (m contiguous); this gives the A fragments of its transpose (m, k):
// rows m = 64 columns of the panel, kSteps steps of 16 panel rows.
template <int kSteps>
MAMBA2_DEVICE void load_transposed(uint32_t (&a)[4 * kSteps], const void* panel, const Lane& me) {
  const int k = (me.lane & 7) + ((me.lane >> 4) & 1) * 8;
  const int m = 16 * me.warp + ((me.lane >> 3) & 1) * 8;
  MAMBA2_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, panel_address(panel, 16 * s + k, m));
    MAMBA2_UNROLL
    for (int i = 0; i < 4; ++i) a[4 * s + i] = r[i];
  }
}
// The inverse: A fragments (m, k) into a panel as their transpose [k][m].
template <int kSteps>
MAMBA2_DEVICE void store_fragments_transposed(void* panel, const uint32_t (&a)[4 * kSteps],
                                              const Lane& me) {
  const int k = (me.lane & 7) + ((me.lane >> 4) & 1) * 8;
  const int m = 16 * me.warp + ((me.lane >> 3) & 1) * 8;
  MAMBA2_UNROLL
  for (int s = 0; s < kSteps; ++s)
    ptx::stmatrix_x4_trans(panel_address(panel, 16 * s + k, m), a[4 * s], a[4 * s + 1],
                           a[4 * s + 2], a[4 * s + 3]);
}
// A panel holds a tile [m][k] (k contiguous): its A fragments, one k step or several.
MAMBA2_DEVICE void load_fragment(uint32_t (&a)[4], const void* panel, int step, const Lane& me) {
  const int row = 16 * me.warp + (me.lane & 15), column = 16 * step + (me.lane >> 4) * 8;
  ptx::ldmatrix_x4(a, panel_address(panel, row, column));
}
template <int kSteps>
MAMBA2_DEVICE void load_fragments(uint32_t (&a)[4 * kSteps], const void* panel, const Lane& me) {
  MAMBA2_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    uint32_t r[4];
    load_fragment(r, panel, s, me);
    MAMBA2_UNROLL
    for (int i = 0; i < 4; ++i) a[4 * s + i] = r[i];
  }
}
// One k step (16 columns) of a fragment into a panel [m][k]: its left 8 columns from `left` on, its
// right ones `apart` further.
MAMBA2_DEVICE void store_columns(void* panel, const uint32_t (&r)[4], int left, int apart,
                                 const Lane& me) {
  const int row = 16 * me.warp + (me.lane & 15), column = left + (me.lane >> 4) * apart;
  ptx::stmatrix_x4(panel_address(panel, row, column), r[0], r[1], r[2], r[3]);
}
// The same, adjacent.
MAMBA2_DEVICE void store_fragment(void* panel, const uint32_t (&r)[4], int step, const Lane& me) {
  store_columns(panel, r, 16 * step, 8, me);
}
// An accumulator as A fragments of the next product.
template <class T, int kPairs>
MAMBA2_DEVICE void round_to_fragments(uint32_t (&a)[kPairs], const float (&d)[2 * kPairs]) {
  MAMBA2_UNROLL
  for (int i = 0; i < kPairs; ++i) a[i] = pack2<T>(d[2 * i], d[2 * i + 1]);
}

// Rows from `count` on become zero (a ragged tail whose rows belong to a neighbour).
// `threads` threads call it; follow with fence_proxy_async_shared and a barrier.
template <int kRows>
MAMBA2_DEVICE void zero_rows(void* panel, int count, int thread, int threads) {
  MAMBA2_NO_UNROLL
  for (int i = count * 8 + thread; i < kRows * 8; i += threads)
    *reinterpret_cast<uint4*>(static_cast<char*>(panel) + i * 16) = uint4{0, 0, 0, 0};
}

// ---- pipeline ----
// A ring of kStages buffers between producers and consumers; each thread keeps its own position.
// A buffer is full, or empty again, when that many threads have arrived (and their bytes are in).
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  MAMBA2_DEVICE void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};
template <int kStages>
struct Ring {
  using Position = RingPosition<kStages>;
  ptx::Mbarrier full[kStages], empty[kStages];
  MAMBA2_DEVICE void init(int producers, int consumers) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], producers);
      ptx::mbarrier_init(&empty[i], consumers);
    }
  }
  MAMBA2_DEVICE void wait_full(const Position& at) {
    ptx::mbarrier_wait(&full[at.stage], at.phase);
  }
  MAMBA2_DEVICE bool is_full(const Position& at) {
    return ptx::mbarrier_passed(&full[at.stage], at.phase);
  }
  MAMBA2_DEVICE void wait_empty(const Position& at) {
    ptx::mbarrier_wait(&empty[at.stage], at.phase ^ 1);
  }
  MAMBA2_DEVICE void fill(const Position& at) { ptx::mbarrier_arrive(&full[at.stage]); }
  MAMBA2_DEVICE void release(const Position& at) { ptx::mbarrier_arrive(&empty[at.stage]); }
};

}  // namespace mamba2::tile
