// chunk_scan_backward (sm_90a), the token side: products of tokens with tokens, transposed, so that
// rows are the own tokens j and columns the tokens i >= j of the own and the later block.
//
//   U_ji = x_j . dy_i     V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji
//   dx_j / delta_j without D = 2^(a_q - a_j) G B_j + sum_i L_ij (C_i.B_j) dy_i
//   R_i = sum_{j<i} V_ij delta_j     sum_{i>j} V_ij     F_j / delta_j
//
// Products run ahead: U of the next target or head under the last of this one, G B_j under the
// weighing of the own block.
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

// The own tokens of this lane's two rows, and their sums over i > j of V_ij.
struct Rows {
  float a_log2[2], delta[2], V[2];
};

// A target is a block of tokens i: the own one, or (in the earlier block) the later one.
enum Target { kOwn = 0, kLater = 1 };

template <class T, int kN, bool kEarlier>
struct TokenSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  static constexpr int kTargets = kEarlier ? 2 : 1;
  float dCB[kTargets][kBlock / 2];  // (j, i), summed over heads
  float U[kBlock / 2];              // of the next target: on its way from one step to the next

  // 16 columns i of the target: L o C B^T into the fragment m, L o delta o U into dCB, sums of V.
  // Where they are a warp's own rows (diagonal), pairs with i < j are masked.
  template <int kTarget>
  MAMBA2_DEVICE void weigh_step(uint32_t (&m)[16], Rows& rows, float (&columns)[16], HeadSums& sums,
                                int step, const float* a_log2, bool diagonal) {
    const int past = 2 * (me.lane % 4) - me.lane / 4;  // i - j where both are in the same 8
    float L[2][4], V[2][4];                            // [8 columns][element]
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float2 a2 = *reinterpret_cast<const float2*>(a_log2 + me.column(2 * step + u));
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
          sums.diagonal[me.row(u)] = past == 0 ? V0 : V1;
          sums.dy_x[me.row(u)] = past == 0 ? U0 : U1;
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
  MAMBA2_DEVICE void weigh(uint32_t (&m)[16], Rows& rows, HeadSums& sums, const float* a_log2) {
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
      if (step >= first_step)
        weigh_step<kTarget>(m, rows, columns, sums, step, a_log2, diagonal >> step & 1);
    }
    column_sums(columns, sums.R[kTarget][me.warp], me.lane);
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
                                 HeadSums& sums) {
    const tile::Lane me = me_anew();
    uint32_t x[16];
    tile::load_fragments<4>(x, stage.x, me);
    float to_state[2], F[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half)
      to_state[half] = ptx::ex2(stage.a_log2[kBackwardQ - 1] - rows.a_log2[half]);
    MAMBA2_UNROLL
    for (int e = 0; e < 32; ++e) GB[e] *= to_state[(e >> 1) & 1];
    row_dots<T>(F, x, GB);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(F[half]);
      if (me.lane % 4 == 0) sums.F[me.row(half)] = sum;
    }
  }
  // This lane's part of dx and of the sums over its rows, to shared memory.
  MAMBA2_DEVICE void leave(const float (&dx)[32], const Rows& rows, HeadSums& sums, int i) {
    const tile::Lane me = me_anew();
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float V = row_sum(rows.V[half]);
      if (me.lane % 4 == 0) sums.V[me.row(half)] = V;
    }
    ptx::mbarrier_wait(&s.dx_read, (i & 1) ^ 1);
    MAMBA2_UNROLL
    for (int e = 0; e < 32; e += 2)
      *reinterpret_cast<float2*>(&s.dx[me.row((e >> 1) & 1)][me.column(e / 4)]) =
          float2{dx[e], dx[e + 1]};
  }

  // The i-th head, whose U of the own block is on its way; leaves the next head's on its way.
  MAMBA2_DEVICE void head(int i) {
    const TokenStage<T>& stage = s.tokens[stage_of(i)];
    const StateStage<T, kN>& states = this->wait_states(i);
    HeadSums& sums = s.sums[stage_of(i)];
    const float* a_log2 = stage.a_log2 + task.block * kBlock;
    const float* delta = stage.delta + task.block * kBlock;
    float dx[32];
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(dx, tile::KMajor<kBlock>{s.B},
                                           tile::KMajor<kHeadDim>{states.G}, false);
    ptx::wgmma_commit_group();
    Rows rows;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      rows.a_log2[half] = a_log2[me.row(half)];
      rows.delta[half] = delta[me.row(half)];
      rows.V[half] = 0;
    }
    uint32_t own[16];
    weigh<kOwn>(own, rows, sums, a_log2);
    if (kEarlier) multiply_tokens(stage, kLater);
    ptx::wgmma_wait_group<kEarlier ? 1 : 0>();
    ptx::wgmma_fence_operand(dx);
    arrive_warp(&s.states_ring.empty[stage_of(i)], me.lane);
    weigh_state(stage, dx, rows, sums);
    multiply_weights(dx, own, stage, kOwn);
    if (kEarlier) {
      uint32_t later[16];
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(U);
      weigh<kLater>(later, rows, sums, a_log2 + kBlock);
      multiply_weights(dx, later, stage, kLater);
    }
    // (of the last head once more, and for nothing, rather than never)
    const int next = min(i + 1, task.heads - 1);
    if (next > i) this->wait_tokens(next);
    multiply_tokens(s.tokens[stage_of(next)], kOwn);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(dx);
    leave(dx, rows, sums, i);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    arrive_warp(&s.head_done[stage_of(i)], me.lane);
    arrive_warp(&s.tokens_ring.empty[stage_of(i)], me.lane);
  }

  // (C B^T)^T of the own tokens j and each block of tokens i.
  MAMBA2_DEVICE void park_BC() {
    MAMBA2_NO_UNROLL
    for (int i = 0; i < kTargets; ++i) {
      float d[32];
      ptx::wgmma_fence_operand(d);
      ptx::wgmma_fence();
      tile::product_ss<T, kBlock, kN / 16>(d, tile::KMajor<kBlock>{s.B},
                                           tile::KMajor<kBlock>{s.C[i]}, false);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(d);
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
    for (int e = 0; e < kTargets * kBlock / 2; ++e) dCB[e / (kBlock / 2)][e % (kBlock / 2)] = 0;
    multiply_tokens(this->wait_tokens(0), kOwn);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i) head(i);
    this->both();
    MAMBA2_UNROLL
    for (int target = 0; target < kTargets; ++target) store_dCB(target, dCB[target]);
    this->both();
    if (kEarlier) store_later_dC();
  }
};

}  // namespace mamba2::ssd::sm90
