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
  // Where this lane's share of OwnBC would begin if it had all groups; of a group.
  MAMBA2_DEVICE float4* own_BC() const {
    if constexpr (kSharers == 1)
      return s.between.groups[me.warp * (7 - me.warp)] + ptx::laneid();
    else
      return nullptr;
  }
  MAMBA2_DEVICE float4 own_BC(const float4* own, int k) const {
    if constexpr (kSharers == 1)
      return own[k * 32];
    else
      return float4{BC[4 * k], BC[4 * k + 1], BC[4 * k + 2], BC[4 * k + 3]};
  }

  MAMBA2_DEVICE Rows rows_of(const TokenStage<T>& stage) const {
    Rows rows;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = task.block * kBlock + me.row(half);
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
    for (int i = 0; i < kRunGroups; ++i) own.diagonal[i] = diagonal_pair(kSharers == 2 ? side : i);
    return own;
  }
  // A group of columns, four pairs a lane: V, the k-th of m, and what U adds to dCB.
  template <int kTarget>
  MAMBA2_DEVICE void weigh_pairs(Fragment& m, float (&V)[4], int k, const float (&L)[4],
                                 const float4& bc4, const Rows& rows) {
    const float bc[4] = {bc4.x, bc4.y, bc4.z, bc4.w};
    float weight[4];
    MAMBA2_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float LU = L[e] * U[4 * k + e];
      V[e] = LU * bc[e];
      weight[e] = L[e] * bc[e];
      dCB[kTarget][4 * k + e] += LU * rows.delta[e >> 1];
    }
    m[2 * k] = pack2<T>(weight[0], weight[1]);
    m[2 * k + 1] = pack2<T>(weight[2], weight[3]);
  }
  MAMBA2_DEVICE static void add_sums(Rows& rows, float* columns, const float (&V)[4]) {
    MAMBA2_UNROLL
    for (int e = 0; e < 4; ++e) {
      rows.V[e >> 1] += V[e];
      columns[e & 1] += V[e] * rows.delta[e >> 1];
    }
  }
  // C B^T of the own block as it is used: 0 where i <= j, so that V is, whatever L there is. The
  // pairs with i == j are kept apart: their C_j . B_j goes to BC_diagonal.
  MAMBA2_DEVICE void cut_triangle(Columns& bc) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k) {
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int past = me.column(group(k)) + (e & 1) - me.row(e >> 1);
        if (past == 0) s.BC_diagonal[me.row(e >> 1)] = bc[4 * k + e];
        bc[4 * k + e] = past > 0 ? bc[4 * k + e] : 0;
      }
    }
    __syncwarp();  // diagonal_pair reads what other lanes left, if only to drop it
  }
  // This lane's C_j . B_j of row 8 half of its warp's, where its fragment has i == j, or 0: a pair.
  MAMBA2_DEVICE uint32_t diagonal_pair(int half) const {
    const float bc = s.BC_diagonal[me.row(half)];
    const int past = me.lane / 4 - 2 * (me.lane % 4);
    return pack2<T>(past == 0 ? bc : 0, past == 1 ? bc : 0);
  }
  // A group of the own block's columns. Pairs i < j have no L: 1 stands in for it.
  MAMBA2_DEVICE void weigh_group(Fragment& m, Rows& rows, float* columns, const float2& a2, int k,
                                 const float4& bc) {
    float L[4], V[4];
    MAMBA2_UNROLL
    for (int e = 0; e < 4; ++e)
      L[e] = ptx::ex2(fminf((e & 1 ? a2.y : a2.x) - rows.a_log2[e >> 1], 0.f));
    weigh_pairs<kOwn>(m, V, k, L, bc, rows);
    add_sums(rows, columns + 2 * k, V);
  }
  // The own block's columns; a warp's own 16 tokens are where the triangle is cut.
  MAMBA2_DEVICE void weigh_own(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                               const OwnColumns& own, const float* a_run_log2) {
    // As a set of bits: told that run == warp, the compiler would index registers with the warp.
    const unsigned diagonal = 1u << me.warp;
    const float4* bc = own_BC();
    MAMBA2_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) columns[i] = 0, m[i] = 0;
    MAMBA2_UNROLL
    for (int run = 0; run < kRuns; ++run) {
      if (run < me.warp) continue;  // every i is before every j
      MAMBA2_UNROLL
      for (int i = 0; i < kRunGroups; ++i) {
        const int k = run * kRunGroups + i;
        weigh_group(m, rows, columns, own.a_log2[k], k, own_BC(bc, k));
        if (diagonal >> run & 1) {
          if (kSharers == 1)
            m[2 * k + i] |= own.diagonal[i];
          else
            m[2 * k] |= side ? 0 : own.diagonal[i], m[2 * k + 1] |= side ? own.diagonal[i] : 0;
        }
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
      float L[4], V[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) L[e] = row_decay[e >> 1] * decay[e & 1];
      weigh_pairs<kLater>(m, V, k, L, bc[k * tile::kWarpgroup], rows);
      columns[2 * k] = columns[2 * k + 1] = 0;
      add_sums(rows, columns + 2 * k, V);
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
