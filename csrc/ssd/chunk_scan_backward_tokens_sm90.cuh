// chunk_scan_backward (sm_90a), the token side: products of tokens with tokens, transposed, so that
// rows are the own tokens j and columns the tokens i >= j of the own and the later block.
//
//   U_ji = x_j . dy_i     V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji
//   dx_j = delta_j [2^(a_q - a_j) G B_j + sum_i L_ij (C_i.B_j) dy_i] + D dy_j
//   R_i = sum_{j<i} V_ij delta_j     sum_{i>j} V_ij     F_j / delta_j
//
// Products run ahead: U of the next target or head under the last of this one, G B_j under the
// weighing of the own block.
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
struct TokenSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  float dCB[2][kBlock / 2];  // (j, i), summed over heads
  float U[kBlock / 2];       // of the next target: on its way from one step to the next

  // 16 columns i of the target: L o C B^T into the fragment m, L o delta o U into dCB, sums of V.
  // Where they are a warp's own rows (diagonal), pairs with i < j are masked.
  template <int kTarget>
  MAMBA2_DEVICE void weigh_step(uint32_t (&m)[16], Rows& rows, float (&columns)[16],
                                HeadResults& results, int step, const float* a_run_log2,
                                bool diagonal) {
    const int past = 2 * (me.lane % 4) - me.lane / 4;  // i - j where both are in the same 8
    float L[2][4], V[2][4];                            // [8 columns][element]
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float2 a2 = *reinterpret_cast<const float2*>(a_run_log2 + me.column(2 * step + u));
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) L[u][e] = ptx::ex2((e & 1 ? a2.y : a2.x) - rows.a_log2[e >> 1]);
    }
    if (kTarget == kOwn && diagonal) {
      L[0][2] = L[0][3] = 0;
      MAMBA2_UNROLL
      for (int u = 0; u < 2; ++u) {
        L[u][2 * u] = past < 0 ? 0 : L[u][2 * u];
        L[u][2 * u + 1] = past < -1 ? 0 : L[u][2 * u + 1];
      }
    }
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int block8 = 2 * step + u;
      const float4 bc4 = s.BC[kTarget][block8][thread];
      const float bc[4] = {bc4.x, bc4.y, bc4.z, bc4.w};
      float weight[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float LU = L[u][e] * U[4 * block8 + e];
        V[u][e] = LU * bc[e];
        weight[e] = L[u][e] * bc[e];
        dCB[kTarget][4 * block8 + e] += LU * rows.delta[e >> 1];
      }
      m[2 * block8] = pack2<T>(weight[0], weight[1]);
      m[2 * block8 + 1] = pack2<T>(weight[2], weight[3]);
    }
    if (kTarget == kOwn && diagonal) {
      MAMBA2_UNROLL
      for (int u = 0; u < 2; ++u) {
        const float V0 = V[u][2 * u], V1 = V[u][2 * u + 1];
        const float U0 = U[8 * step + 6 * u], U1 = U[8 * step + 6 * u + 1];
        if (past == 0 || past == -1) {
          results.diagonal[me.row(u)] = past == 0 ? V0 : V1;
          results.dy_x[me.row(u)] = past == 0 ? U0 : U1;
        }
        V[u][2 * u] = past == 0 ? 0 : V0;
        V[u][2 * u + 1] = past == -1 ? 0 : V1;
      }
    }
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        rows.V[e >> 1] += V[u][e];
        columns[2 * (2 * step + u) + (e & 1)] += V[u][e] * rows.delta[e >> 1];
      }
    }
  }
  // All of the target.
  template <int kTarget>
  MAMBA2_DEVICE void weigh(uint32_t (&m)[16], Rows& rows, HeadResults& results,
                           const float* a_run_log2) {
    // The own block's steps before a warp's own rows: every i is before every j.
    const int first_step = kTarget == kOwn ? me.warp : 0;
    // As a set of bits: told that step == warp, the compiler would index registers with the warp.
    const unsigned diagonal = kTarget == kOwn ? 1u << me.warp : 0;
    float columns[16];
    MAMBA2_UNROLL
    for (int i = 0; i < 16; ++i) columns[i] = 0, m[i] = 0;
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      __syncwarp();  // keeps the compiler from loading all steps' C B^T at once: registers
      if (step >= first_step) {
        weigh_step<kTarget>(m, rows, columns, results, step, a_run_log2, diagonal >> step & 1);
        const float run = run_decay(a_run_log2, step);
        rows.a_log2[0] -= run, rows.a_log2[1] -= run;
      }
    }
    column_sums(columns, results.R[kTarget][me.warp], me.lane);
  }

  // `me`, with the lane asked for anew: what follows from a kept one would cost registers.
  MAMBA2_DEVICE tile::Lane me_anew() const {
    tile::Lane anew = me;
    anew.lane = ptx::laneid();
    return anew;
  }
  // U = x dy^T of the target: issued.
  MAMBA2_DEVICE void multiply_tokens(const TokenStage<T>& stage, int target) {
    ptx::wgmma_fence_operand(U);
    ptx::wgmma_fence();
    tile::product_ss<T, kBlock, 4>(U, tile::KMajor<kBlock>{stage.x},
                                   tile::KMajor<kBlock>{stage.dy[target]}, false);
    ptx::wgmma_commit_group();
  }
  // dx += m dy of the target: issued.
  MAMBA2_DEVICE void multiply_weights(float (&dx)[32], const uint32_t (&m)[16],
                                      const TokenStage<T>& stage, int target) {
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_rs<T, kHeadDim, 4>(dx, m, tile::MnMajor<kBlock>{stage.dy[target]}, true);
    ptx::wgmma_commit_group();
  }
  // G B_j becomes 2^(a_q - a_j) G B_j; its product with x_j is F_j / delta_j.
  MAMBA2_DEVICE void weigh_state(const TokenStage<T>& stage, float (&GB)[32], const Rows& rows,
                                 HeadResults& results) {
    const tile::Lane me = me_anew();
    uint32_t x[16];
    tile::load_fragments<4>(x, stage.x, me);
    float rest = 0, to_state[2], F[2];  // from the own block's end to the chunk's
    if (earlier()) {
      MAMBA2_UNROLL
      for (int run = 4; run < 8; ++run) rest += run_decay(stage.a_run_log2, run);
    }
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) to_state[half] = ptx::ex2(rest - rows.a_log2[half]);
    MAMBA2_UNROLL
    for (int e = 0; e < 32; ++e) GB[e] *= to_state[(e >> 1) & 1];
    row_dots<T>(F, x, GB);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(F[half]);
      if (me.lane % 4 == 0) results.F[me.row(half)] = sum;
    }
  }
  // This lane's part of dx, complete and rounded, and of the sums over its rows: to shared memory.
  MAMBA2_DEVICE void leave(const TokenStage<T>& stage, float (&dx)[32], const Rows& rows,
                           HeadResults& results, int i) {
    if (args.dx_sum) this->pass_on(dx, i);
    const tile::Lane me = me_anew();
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float V = row_sum(rows.V[half]);
      if (me.lane % 4 == 0) {
        results.V[me.row(half)] = V;
        results.Q[me.row(half)] = V * rows.delta[half];
      }
    }
    uint32_t dy[16];
    tile::load_fragments<4>(dy, stage.dy[0], me);
    if (i > 0) {
      const ResultSlot last(i - 1);
      ptx::mbarrier_wait(&s.results_ring.empty[last.stage], last.phase);
    }
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int pair = 4 * step + k;
        const float2 v = unpack2<T>(dy[pair]);
        const float2 D = *reinterpret_cast<const float2*>(stage.D + me.column(pair / 2));
        r[k] = pack2<T>(dx[2 * pair] * rows.delta[k & 1] + D.x * v.x,
                        dx[2 * pair + 1] * rows.delta[k & 1] + D.y * v.y);
      }
      tile::store_fragment(s.dx, r, step, me);
    }
  }

  MAMBA2_DEVICE bool earlier() const { return task.block == 0; }
  // U of the own block of the head after the i-th: issued. (After the last one it is computed once
  // more and for nothing, rather than never: as many products are then always on their way.)
  MAMBA2_DEVICE void multiply_next(int i) {
    const int next = min(i + 1, task.heads - 1);
    if (next > i) this->wait_tokens(next);
    multiply_tokens(s.tokens[TokenSlot(next).stage], kOwn);
  }

  // The i-th head, whose U of the own block is at hand; leaves that of the next head.
  MAMBA2_DEVICE void head(int i) {
    const TokenStage<T>& stage = s.tokens[TokenSlot(i).stage];
    const StateStage<T, kN>& states = this->wait_states(i);
    HeadResults& results = s.results[ResultSlot(i).stage];
    const float* a_run_log2 = stage.a_run_log2 + task.block * kBlock;
    const float* delta = stage.delta + task.block * kBlock;
    float dx[32];  // lacks delta_j and D until the end
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(dx, tile::KMajor<kBlock>{s.B},
                                           tile::KMajor<kHeadDim>{states.G}, false);
    ptx::wgmma_commit_group();
    Rows rows;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      rows.a_log2[half] = a_run_log2[me.row(half)];
      rows.delta[half] = delta[me.row(half)];
      rows.V[half] = 0;
    }
    uint32_t own[16];
    weigh<kOwn>(own, rows, results, a_run_log2);
    if (earlier())
      multiply_tokens(stage, kLater);
    else
      multiply_next(i);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(dx);
    arrive_warp(&s.states_ring.empty[StateSlot(i).stage], me.lane);
    weigh_state(stage, dx, rows, results);
    multiply_weights(dx, own, stage, kOwn);
    if (earlier()) {
      uint32_t later[16];
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(U);
      weigh<kLater>(later, rows, results, a_run_log2 + kBlock);
      multiply_weights(dx, later, stage, kLater);
      multiply_next(i);
      ptx::wgmma_wait_group<1>();
    } else {
      ptx::wgmma_wait_group<0>();
    }
    ptx::wgmma_fence_operand(dx);
    leave(stage, dx, rows, results, i);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    arrive_warp(&s.results_ring.full[ResultSlot(i).stage], me.lane);
    arrive_warp(&s.tokens_ring.empty[TokenSlot(i).stage], me.lane);
  }

  // (C B^T)^T of the own tokens j and each block of tokens i.
  MAMBA2_DEVICE void park_BC() {
    MAMBA2_NO_UNROLL
    for (int i = 0; i < 2 - task.block; ++i) {
      float d[32];
      ptx::wgmma_fence_operand(d);
      ptx::wgmma_fence();
      tile::product_ss<T, kBlock, kN / 16>(
          d, tile::KMajor<kBlock>{s.B}, tile::KMajor<kBlock>{i == kOwn ? s.C : s.later_C()}, false);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(d);
      ptx::bar_sync(kTokenSideBarrier, tile::kWarpgroup);  // all have read later_C
      MAMBA2_UNROLL
      for (int e = 0; e < 8; ++e)
        s.BC[i][e][thread] = float4{d[4 * e], d[4 * e + 1], d[4 * e + 2], d[4 * e + 3]};
    }
  }
  MAMBA2_DEVICE void store_dCB(int target, const float (&d)[kBlock / 2]) {
    uint32_t a[16];
    tile::round_to_fragments<T>(a, d);
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      const uint32_t r[4] = {a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3]};
      tile::store_fragment(this->dCB_panel(target), r, step, me);
    }
  }
  // What dCB gives to the later tokens' dC.
  MAMBA2_DEVICE void store_later_dC() {
    float dC[kN / 2];
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) dC[e] = 0;
    uint32_t a[16];
    tile::load_transposed<4>(a, this->dCB_panel(kLater), me);
    add_product<T, kN>(dC, a, tile::MnMajor<kBlock>{s.B});
    this->store(this->slice(args.dC_later, kBlock, 0), dC);
  }

  MAMBA2_DEVICE void run() {
    this->wait_group();
    park_BC();
    MAMBA2_UNROLL
    for (int e = 0; e < kBlock; ++e) dCB[e / (kBlock / 2)][e % (kBlock / 2)] = 0;
    multiply_tokens(this->wait_tokens(0), kOwn);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i) head(i);
    this->both();
    store_dCB(kOwn, dCB[kOwn]);
    if (earlier()) store_dCB(kLater, dCB[kLater]);
    this->both();
    if (earlier()) store_later_dC();
  }
};

}  // namespace mamba2::ssd::sm90
