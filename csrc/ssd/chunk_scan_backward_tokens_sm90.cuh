// chunk_scan_backward (sm_90a), the token side: products of tokens with tokens, transposed, so that
// rows are the own tokens j and columns the tokens i >= j of the own and the later block.
//
//   U_ji = x_j . dy_i     V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji
//   dx_j = delta_j [2^(a_q - a_j) G B_j + sum_i L_ij (C_i.B_j) dy_i] + D dy_j
//   R_i = sum_{j<i} V_ij delta_j     Q_j = delta_j sum_{i>j} V_ij     F_j / delta_j
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

// The own tokens of this lane's two rows, and their sums over i > j of V_ij.
struct Rows {
  float a_log2[2], delta[2], V[2];
};

template <class T, int kN>
struct TokenSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  // A target is a block of tokens i: 0 the own one, 1 the later one. One copy of the code serves
  // both, on registers that a second target swaps in.
  int target = 0;                 // whose dCB is at hand
  float dCB[kBlock / 2];          // (j, i), summed over heads
  float resting_dCB[kBlock / 2];  // of the other target

  MAMBA2_DEVICE int targets() const { return 2 - task.block; }
  MAMBA2_DEVICE void swap_targets() {
    MAMBA2_UNROLL
    for (int e = 0; e < kBlock / 2; ++e) {
      const float rests = resting_dCB[e];
      resting_dCB[e] = dCB[e];
      dCB[e] = rests;
    }
    target ^= 1;
  }

  // 16 columns i of the target: L o C B^T into the fragment m, L o delta o U into dCB, sums of V.
  // Where they are a warp's own rows (diagonal), pairs with i < j are masked.
  MAMBA2_DEVICE void weigh_step(uint32_t (&m)[16], Rows& rows, float (&columns)[16], HeadSums& sums,
                                int step, const float (&U)[32], const float* a_log2,
                                bool diagonal) {
    const int past = 2 * (me.lane % 4) - me.lane / 4;  // i - j where both are in the same 8
    float L[2][4], V[2][4];                            // [8 columns][element]
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float2 a2 = *reinterpret_cast<const float2*>(a_log2 + me.column(2 * step + u));
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) L[u][e] = ptx::ex2((e & 1 ? a2.y : a2.x) - rows.a_log2[e >> 1]);
    }
    if (diagonal) {
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
      const float4 bc4 = s.BC[target][block8][thread];
      const float bc[4] = {bc4.x, bc4.y, bc4.z, bc4.w};
      float weight[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float LU = L[u][e] * U[4 * block8 + e];
        V[u][e] = LU * bc[e];
        weight[e] = L[u][e] * bc[e];
        dCB[4 * block8 + e] += LU * rows.delta[e >> 1];
      }
      m[2 * block8] = pack2<T>(weight[0], weight[1]);
      m[2 * block8 + 1] = pack2<T>(weight[2], weight[3]);
    }
    if (diagonal) {
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
  MAMBA2_DEVICE void weigh(uint32_t (&m)[16], Rows& rows, HeadSums& sums, const float (&U)[32],
                           const float* a_log2) {
    const int first_step = target == 0 ? me.warp : 0;  // before it, every i is before every j
    // As a set of bits: told that step == warp, the compiler would index registers with the warp.
    const unsigned diagonal = target == 0 ? 1u << me.warp : 0;
    float columns[16];
    MAMBA2_UNROLL
    for (int i = 0; i < 16; ++i) columns[i] = 0, m[i] = 0;
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      __syncwarp();  // keeps the compiler from loading all steps' C B^T at once: registers
      if (step >= first_step)
        weigh_step(m, rows, columns, sums, step, U, a_log2, diagonal >> step & 1);
    }
    column_sums(columns, sums.R[target][me.warp], me.lane);
  }

  // U = x dy^T of the target: issued.
  MAMBA2_DEVICE void multiply_tokens(float (&U)[32], const HeadStage<T, kN>& stage) {
    ptx::wgmma_fence_operand(U);
    ptx::wgmma_fence();
    tile::product_ss<T, kBlock, 4>(U, tile::KMajor<kBlock>{stage.x},
                                   tile::KMajor<kBlock>{stage.dy[target]}, false);
    ptx::wgmma_commit_group();
  }
  // G B_j becomes 2^(a_q - a_j) G B_j; its product with x_j is F_j / delta_j.
  MAMBA2_DEVICE void weigh_state(const HeadStage<T, kN>& stage, float (&GB)[32], const Rows& rows,
                                 int head) {
    uint32_t x[16];
    tile::load_fragments<4>(x, stage.x, me);
    float to_state[2], F[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half)
      to_state[half] = ptx::ex2(stage.a_log2[kBackwardQ - 1] - rows.a_log2[half]);
    MAMBA2_UNROLL
    for (int e = 0; e < 32; ++e) GB[e] *= to_state[(e >> 1) & 1];
    row_dots<T>(F, x, GB);
    const int64_t own = args.head_at(task.i_chunk, head) * kBackwardQ + task.block * kBlock;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(F[half]);
      if (me.lane % 4 == 0) args.to_state[own + me.row(half)] = sum;
    }
  }
  // This lane's rows of dx: complete, rounded, through shared memory into 16-byte stores.
  MAMBA2_DEVICE void store_dx(const HeadStage<T, kN>& stage, const float (&dx)[32],
                              const Rows& rows, int head) {
    uint32_t dy[16];
    tile::load_fragments<4>(dy, stage.dy[0], me);
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int pair = 4 * step + i;
        const float2 v = unpack2<T>(dy[pair]);
        const float2 D = *reinterpret_cast<const float2*>(stage.D + me.column(pair / 2));
        r[i] = pack2<T>(dx[2 * pair] * rows.delta[i & 1] + D.x * v.x,
                        dx[2 * pair + 1] * rows.delta[i & 1] + D.y * v.y);
      }
      tile::store_fragment(s.dx, r, step, me);
    }
    __syncwarp();
    const int64_t token = task.chunk.token + task.block * kBlock;
    T* out = static_cast<T*>(args.dx.ptr) + task.chunk.row * args.dx.b + token * args.dx.l +
             head * args.dx.h;
    MAMBA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * me.warp + 4 * i + me.lane / 8, column = me.lane % 8 * 8;
      if (row < task.own())
        *reinterpret_cast<uint4*>(out + row * args.dx.l + column) =
            *static_cast<const uint4*>(tile::panel_address(s.dx, row, column));
    }
    __syncwarp();
  }

  // The sums of both sides, put together and written.
  MAMBA2_DEVICE void write_sums(const HeadStage<T, kN>& stage, HeadSums& sums, const Rows& rows,
                                int i_head) {
    const int head = task.first_head + i_head;
    const int64_t index = args.head_at(task.i_chunk, head);
    const int64_t own = index * kBackwardQ + task.block * kBlock;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float V = row_sum(rows.V[half]);
      if (me.lane % 4 == 0) sums.V[me.row(half)] = V;
    }
    ptx::bar_sync(kTokenSideBarrier, tile::kWarpgroup);
    ptx::mbarrier_wait(&s.state_sums[stage_of(i_head)], phase_of(i_head));
    const bool earlier = task.block == 0;
    const int i = thread % kBlock;
    if (thread < kBlock) {
      const float (&R)[4][kBlock] = sums.R[0];
      const float Q = sums.V[i] * stage.delta[task.block * kBlock + i];
      const float row = R[0][i] + R[1][i] + R[2][i] + R[3][i] - Q;
      args.columns[own + i] = sums.V[i] + sums.diagonal[i];
      args.rows_out[own + i] = earlier ? row : row + sums.E[i];
      if (earlier) args.later_rows[own + i] = sums.E[i];
      // (state_sweeps has written that of a last chunk)
      if (!earlier && i == 0 && !(task.chunk.is_last && args.d_final_states))
        args.through[index] = sums.K[0] + sums.K[1] + sums.K[2] + sums.K[3];
    } else {
      const float (&R)[4][kBlock] = sums.R[1];
      if (earlier) args.later_rows[own + kBlock + i] = R[0][i] + R[1][i] + R[2][i] + R[3][i];
      const float dD = args.D_per_channel
                           ? sums.dD[0][i] + sums.dD[1][i] + sums.dD[2][i] + sums.dD[3][i]
                           : sums.dy_x[i];
      const int64_t block = int64_t(task.i_chunk) * 2 + task.block;
      args.dD_blocks[(block * args.h + head) * kHeadDim + i] = dD;
    }
  }

  MAMBA2_DEVICE void head(const HeadStage<T, kN>& stage, HeadSums& sums, int i_head) {
    const float* a_log2 = stage.a_log2 + task.block * kBlock;
    const float* delta = stage.delta + task.block * kBlock;
    float U[32], dx[32];  // dx lacks delta_j and D until the end
    Rows rows;
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(dx, tile::KMajor<kBlock>{s.B},
                                           tile::KMajor<kHeadDim>{stage.G}, false);
    ptx::wgmma_commit_group();
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      rows.a_log2[half] = a_log2[me.row(half)];
      rows.delta[half] = delta[me.row(half)];
      rows.V[half] = 0;
    }
    multiply_tokens(U, stage);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(dx);
    weigh_state(stage, dx, rows, task.first_head + i_head);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);

    MAMBA2_NO_UNROLL
    for (int i = 0; i < targets(); ++i) {
      uint32_t m[16];
      weigh(m, rows, sums, U, a_log2 + target * kBlock);
      ptx::wgmma_fence_operand(dx);
      ptx::wgmma_fence();
      tile::product_rs<T, kHeadDim, 4>(dx, m, tile::MnMajor<kBlock>{stage.dy[target]}, true);
      ptx::wgmma_commit_group();
      if (task.block == 0) swap_targets();
      if (i + 1 < targets()) multiply_tokens(U, stage);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(dx);
      ptx::wgmma_fence_operand(U);
    }
    store_dx(stage, dx, rows, task.first_head + i_head);
    write_sums(stage, sums, rows, i_head);
  }

  // (C B^T)^T of the own tokens j and each block of tokens i.
  MAMBA2_DEVICE void park_BC() {
    MAMBA2_NO_UNROLL
    for (int i = 0; i < targets(); ++i) {
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
  // dCB at hand to its panel.
  MAMBA2_DEVICE void store_dCB() {
    uint32_t a[16];
    tile::round_to_fragments<T>(a, dCB);
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      const uint32_t r[4] = {a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3]};
      tile::store_fragment(this->dCB_panel(target), r, step, me);
    }
  }

  MAMBA2_DEVICE void run() {
    this->wait_group();
    park_BC();
    MAMBA2_UNROLL
    for (int e = 0; e < kBlock / 2; ++e) dCB[e] = resting_dCB[e] = 0;
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i) {
      head(this->wait_head(i), s.sums[stage_of(i)], i);
      arrive_warp(&s.ring.empty[stage_of(i)], me.lane);
    }
    this->both();
    MAMBA2_NO_UNROLL
    for (int i = 0; i < targets(); ++i) {
      store_dCB();
      if (task.block == 0) swap_targets();
    }
    this->both();
    if (task.block == 0) {
      float dC[kN / 2];
      MAMBA2_UNROLL
      for (int e = 0; e < kN / 2; ++e) dC[e] = 0;
      uint32_t a[16];
      tile::load_transposed<4>(a, this->dCB_panel(1), me);
      add_product<T, kN>(dC, a, tile::MnMajor<kBlock>{s.B});
      this->store(this->slice(args.dC_later, kBlock, 0), dC);
    }
  }
};

}  // namespace mamba2::ssd::sm90
