// chunk_scan_backward (sm_90a), the token sides: what they make of their pairs (i, j), and its
// sums.
//
//   V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji     m_ji = L_ij (C_i.B_j)
//   R_i = sum_{j<i} V_ij delta_j     sum_{i>j} V_ij
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

// The own tokens of this lane's two rows, and their sums over i > j of V_ij.
struct Rows {
  // Cumulative log2 decay, counted from the first of the 16 tokens i at hand: under strong decay a
  // chunk's own sums lack the bits that near tokens differ in.
  float a_log2[2];
  float delta[2], V[2];
};
// The decay of one run of 16 tokens.
MAMBA2_DEVICE float run_decay(const float* a_run_log2, int run) {
  return a_run_log2[16 * run + 15];
}

template <class T, int kN>
struct TokenPairs : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task;
  using typename Base::Shape;
  static constexpr int kSharers = Shape::kSharers;
  static constexpr int kRuns = 4, kRunGroups = 2 / kSharers;  // runs of 16 tokens i, groups of one
  static constexpr int kGroups = kRuns * kRunGroups;          // of 8 columns, of either target
  using Columns = float[4 * kGroups];      // an accumulator of this side's columns
  using Fragment = uint32_t[2 * kGroups];  // the same rounded: steps of an A operand
  const int side;
  float dCB[2][4 * kGroups];  // (j, i), summed over this side's heads
  Columns BC;                 // (C B^T)^T of the own block, of a head that is shared
  Columns U;                  // of the next target: on its way from one step to the next

  MAMBA2_DEVICE TokenPairs(const BackwardArgs& args, ChunkScanBackwardSmem<T, kN>& s,
                           const ScanTask& task)
      : Base(args, s, task), side(tile::uniform(threadIdx.x / tile::kWarpgroup) - 1) {}

  MAMBA2_DEVICE bool earlier() const { return task.block == 0; }
  // Asked for anew: what follows from a kept one would cost registers.
  MAMBA2_DEVICE int thread_anew() const { return 32 * me.warp + ptx::laneid(); }
  // Which of a head's sharers this is.
  MAMBA2_DEVICE int part() const { return kSharers == 2 ? side : 0; }
  MAMBA2_DEVICE int group(int k) const { return kSharers * k + part(); }
  // Where this lane's share of OwnBC would begin if it had all groups.
  MAMBA2_DEVICE float4* own_BC() const {
    return s.between.groups[me.warp * (7 - me.warp)] + ptx::laneid();
  }

  MAMBA2_DEVICE Rows rows_of(const TokenStage<T>& stage) const {
    Rows rows;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = task.block * kBlock + own_row<Shape>(me, half);
      rows.a_log2[half] = stage.a_run_log2[row];
      rows.delta[half] = stage.delta[row];
      rows.V[half] = 0;
    }
    return rows;
  }
  // Of this lane's own columns: cumulative log2 decay, and C_j . B_j, each of which becomes the m
  // of its pair. Loaded before any product is issued: what comes to shared memory after one waits
  // for it.
  struct OwnColumns {
    float2 a_log2[kGroups];
    uint32_t diagonal[kRunGroups];
  };
  MAMBA2_DEVICE OwnColumns load_columns(const float* a_run_log2) const {
    OwnColumns own;
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k)
      own.a_log2[k] = *reinterpret_cast<const float2*>(a_run_log2 + me.column(group(k)));
    MAMBA2_UNROLL
    for (int i = 0; i < kRunGroups; ++i)
      own.diagonal[i] = diagonal_pair(kSharers == 2 ? (me.warp ^ side) & 1 : i);
    return own;
  }
  // A group of columns and this lane's half-th row, two pairs: V and its sums, m, and what U adds
  // to dCB.
  template <int kTarget>
  MAMBA2_DEVICE void weigh_pairs(Fragment& m, Rows& rows, float* columns, int k, int half,
                                 const float (&L)[2], const float2& bc2) {
    const float bc[2] = {bc2.x, bc2.y};
    float weight[2];
    MAMBA2_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float LU = L[e] * U[4 * k + 2 * half + e];
      const float V = LU * bc[e];
      weight[e] = L[e] * bc[e];
      dCB[kTarget][4 * k + 2 * half + e] += LU * rows.delta[half];
      rows.V[half] += V;
      columns[2 * k + e] += V * rows.delta[half];
    }
    m[2 * k + half] = pack2<T>(weight[0], weight[1]);
  }
  // C B^T of the own block as it is used: 0 where i <= j, so that V is, whatever L there is. The
  // pairs with i == j are kept apart: their C_j . B_j goes to BC_diagonal.
  MAMBA2_DEVICE void cut_triangle(Columns& bc) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k) {
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int past = me.column(group(k)) + (e & 1) - own_row<Shape>(me, e >> 1);
        if (past == 0) s.BC_diagonal[own_row<Shape>(me, e >> 1)] = bc[4 * k + e];
        bc[4 * k + e] = past > 0 ? bc[4 * k + e] : 0;
      }
    }
    __syncwarp();  // diagonal_pair reads what other lanes left, if only to drop it
  }
  // This lane's C_j . B_j of the half-th of its warp's eights, where its fragment has i == j, or 0:
  // a pair.
  MAMBA2_DEVICE uint32_t diagonal_pair(int half) const {
    const float bc = s.BC_diagonal[own_row<Shape>(me, half)];
    const int past = me.lane / 4 - 2 * (me.lane % 4);
    return pack2<T>(past == 0 ? bc : 0, past == 1 ? bc : 0);
  }
  // A group of the own block's columns and this lane's half-th row, its decay counted from the
  // beginning of the group's run. Pairs i < j have no L: 1 stands in for it.
  MAMBA2_DEVICE void weigh_row(Fragment& m, Rows& rows, float* columns, const float2& a2, int k,
                               int half, float row_log2, const float2& bc) {
    const float L[2] = {ptx::ex2(fminf(a2.x - row_log2, 0.f)),
                        ptx::ex2(fminf(a2.y - row_log2, 0.f))};
    weigh_pairs<kOwn>(m, rows, columns, k, half, L, bc);
  }
  // The own block's columns.
  MAMBA2_DEVICE void weigh_own(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                               const OwnColumns& own, const float* a_run_log2) {
    MAMBA2_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) columns[i] = 0, m[i] = 0;
    if constexpr (Shape::kFolded)
      weigh_folded(m, rows, columns, own, a_run_log2);
    else
      weigh_triangle(m, rows, columns, own, a_run_log2);
  }
  // Of this side's four groups, one of each run: the first of a warp's eights is in run 0 or 1, the
  // second in run 3 or 2, so that five of eight groups of a row have pairs, four of them whatever
  // the warp.
  MAMBA2_DEVICE void weigh_folded(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                                  const OwnColumns& own, const float* a_run_log2) {
    const bool outer = me.warp < kRuns / 2;
    const auto weigh = [&](int run, int half, float row_log2, bool is_own) {
      const float2 bc = {BC[4 * run + 2 * half], BC[4 * run + 2 * half + 1]};
      weigh_row(m, rows, columns, own.a_log2[run], run, half, row_log2, bc);
      const bool here = is_own && (side + own_eight<Shape>(me.warp, half)) % 2 == 0;
      m[2 * run + half] |= here ? own.diagonal[0] : 0;
    };
    float a_log2[2] = {rows.a_log2[0] - (outer ? run_decay(a_run_log2, 0) : 0),
                       rows.a_log2[1] - (outer ? 0 : run_decay(a_run_log2, 2))};
    MAMBA2_UNROLL
    for (int run = 1; run < kRuns; ++run) {
      weigh(run, 0, a_log2[0], run == 1 && !outer);
      a_log2[0] -= run_decay(a_run_log2, run);
    }
    weigh(3, 1, a_log2[1], outer);
    a_log2[1] -= run_decay(a_run_log2, 3);
    if (outer)
      weigh(0, 0, rows.a_log2[0], true);
    else
      weigh(2, 1, rows.a_log2[1], true);
    rows.a_log2[0] = a_log2[0], rows.a_log2[1] = a_log2[1];
  }
  // A warp's own 16 tokens are where the triangle is cut.
  MAMBA2_DEVICE void weigh_triangle(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                                    const OwnColumns& own, const float* a_run_log2) {
    // As a set of bits: told that run == warp, the compiler would index registers with the warp.
    const unsigned diagonal = 1u << me.warp;
    const float4* bc = own_BC();
    MAMBA2_UNROLL
    for (int run = 0; run < kRuns; ++run) {
      if (run < me.warp) continue;  // every i is before every j
      MAMBA2_UNROLL
      for (int i = 0; i < kRunGroups; ++i) {
        const int k = run * kRunGroups + i;
        const float4 bc4 = bc[k * 32];
        weigh_row(m, rows, columns, own.a_log2[k], k, 0, rows.a_log2[0], float2{bc4.x, bc4.y});
        weigh_row(m, rows, columns, own.a_log2[k], k, 1, rows.a_log2[1], float2{bc4.z, bc4.w});
        if (diagonal >> run & 1) m[2 * k + i] |= own.diagonal[i];
      }
      const float decay = run_decay(a_run_log2, run);
      rows.a_log2[0] -= decay, rows.a_log2[1] -= decay;
    }
  }
  // The later block's columns. L_ij is the product of what is left of j at the own block's end and
  // of what i has left of that: neither exceeds 1.
  MAMBA2_DEVICE void weigh_later(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                                 const float* a_run_log2) {
    const float row_decay[2] = {ptx::ex2(-rows.a_log2[0]), ptx::ex2(-rows.a_log2[1])};
    const float4* bc = s.BC_later[kGroups * part()] + thread_anew();
    float before = 0;  // decay of the runs before
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k) {
      if (kSharers == 2) __syncwarp();  // no loads of all groups' C B^T at once: registers
      const float2 a2 = *reinterpret_cast<const float2*>(a_run_log2 + me.column(group(k)));
      const float decay[2] = {ptx::ex2(a2.x + before), ptx::ex2(a2.y + before)};
      const float4 bc4 = bc[k * tile::kWarpgroup];
      columns[2 * k] = columns[2 * k + 1] = 0;
      MAMBA2_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float L[2] = {row_decay[half] * decay[0], row_decay[half] * decay[1]};
        const float2 bc2 = half == 0 ? float2{bc4.x, bc4.y} : float2{bc4.z, bc4.w};
        weigh_pairs<kLater>(m, rows, columns, k, half, L, bc2);
      }
      if ((k + 1) % kRunGroups == 0) before += run_decay(a_run_log2, k / kRunGroups);
    }
  }
  MAMBA2_DEVICE void leave_columns(float (&columns)[2 * kGroups], HeadResults& results,
                                   int target) const {
    if constexpr (kSharers == 2)
      alternate_column_sums(columns, results.R[target][me.warp] + 8 * side, me.lane);
    else
      column_sums(columns, results.R[target][me.warp], me.lane);
  }
};

}  // namespace mamba2::ssd::sm90
