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
  static constexpr int kGroups = 4;        // of 8 columns, of either target
  using Columns = float[4 * kGroups];      // an accumulator of this side's columns
  using Fragment = uint32_t[2 * kGroups];  // the same rounded: two steps of an A operand
  const int side;
  float dCB[2][4 * kGroups];  // (j, i), summed over heads
  Columns BC;                 // (C B^T)^T of the own block
  Columns U;                  // of the next target: on its way from one step to the next

  MAMBA2_DEVICE TokenPairs(const BackwardArgs& args, ChunkScanBackwardSmem<T, kN>& s,
                           const ScanTask& task)
      : Base(args, s, task), side(tile::uniform(threadIdx.x / tile::kWarpgroup) - 1) {}

  MAMBA2_DEVICE bool earlier() const { return task.block == 0; }
  // Asked for anew: what follows from a kept one would cost registers.
  MAMBA2_DEVICE int thread_anew() const { return 32 * me.warp + ptx::laneid(); }
  MAMBA2_DEVICE int group(int k) const { return 2 * k + side; }

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
  // Cumulative log2 decay of this lane's own columns. Loaded before any product is issued: what
  // comes to shared memory after one waits for it.
  MAMBA2_DEVICE void load_decays(float2 (&a_log2)[kGroups], const float* a_run_log2) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k)
      a_log2[k] = *reinterpret_cast<const float2*>(a_run_log2 + me.column(group(k)));
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
  // The pairs with i == j, which are one side's or the other's: kept apart from all sums.
  MAMBA2_DEVICE void take_diagonal(float (&V)[4], int k, int past, HeadResults& results) const {
    float own_V = 0, own_U = 0;
    bool has = false;
    MAMBA2_UNROLL
    for (int e = 0; e < 4; ++e) {
      const bool here = past - 8 * (e >> 1) + (e & 1) == 0;
      own_V = here ? V[e] : own_V;
      own_U = here ? U[4 * k + e] : own_U;
      V[e] = here ? 0 : V[e];
      has = has || here;
    }
    if (has) {
      results.diagonal[me.row(side)] = own_V;
      results.dy_x[me.row(side)] = own_U;
    }
  }
  // The own block's columns; a warp's own 16 tokens are where the triangle is cut.
  MAMBA2_DEVICE void weigh_own(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                               HeadResults& results, const float2 (&a_log2)[kGroups],
                               const float* a_run_log2) {
    const int past = 2 * (me.lane % 4) - me.lane / 4 + 8 * side;  // i - j there, of the first pair
    // As a set of bits: told that k == warp, the compiler would index registers with the warp.
    const unsigned diagonal = 1u << me.warp;
    MAMBA2_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) columns[i] = 0, m[i] = 0;
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k) {
      if (k < me.warp) continue;  // every i is before every j
      const float2 a2 = a_log2[k];
      float L[4], V[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) L[e] = ptx::ex2((e & 1 ? a2.y : a2.x) - rows.a_log2[e >> 1]);
      if (diagonal >> k & 1) {
        MAMBA2_UNROLL
        for (int e = 0; e < 4; ++e) L[e] = past - 8 * (e >> 1) + (e & 1) < 0 ? 0 : L[e];
      }
      const float4 bc = {BC[4 * k], BC[4 * k + 1], BC[4 * k + 2], BC[4 * k + 3]};
      weigh_pairs<kOwn>(m, V, k, L, bc, rows);
      if (diagonal >> k & 1) take_diagonal(V, k, past, results);
      add_sums(rows, columns + 2 * k, V);
      const float run = run_decay(a_run_log2, k);
      rows.a_log2[0] -= run, rows.a_log2[1] -= run;
    }
  }
  // The later block's columns. L_ij is the product of what is left of j at the own block's end and
  // of what i has left of that: neither exceeds 1.
  MAMBA2_DEVICE void weigh_later(Fragment& m, Rows& rows, float (&columns)[2 * kGroups],
                                 const float* a_run_log2) {
    const float row_decay[2] = {ptx::ex2(-rows.a_log2[0]), ptx::ex2(-rows.a_log2[1])};
    const float4* bc = s.BC_later[side][0] + thread_anew();
    float before = 0;  // decay of the runs before
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k) {
      if (kN > 64) __syncwarp();  // no loads of all groups' C B^T at once: registers
      const float2 a2 = *reinterpret_cast<const float2*>(a_run_log2 + me.column(group(k)));
      const float decay[2] = {ptx::ex2(a2.x + before), ptx::ex2(a2.y + before)};
      float L[4], V[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) L[e] = row_decay[e >> 1] * decay[e & 1];
      weigh_pairs<kLater>(m, V, k, L, bc[k * tile::kWarpgroup], rows);
      columns[2 * k] = columns[2 * k + 1] = 0;
      add_sums(rows, columns + 2 * k, V);
      before += run_decay(a_run_log2, k);
    }
  }
  MAMBA2_DEVICE void leave_columns(float (&columns)[2 * kGroups], HeadResults& results,
                                   int target) const {
    alternate_column_sums(columns, results.R[target][me.warp] + 8 * side, me.lane);
  }
};

}  // namespace mamba2::ssd::sm90
