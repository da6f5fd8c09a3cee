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

template <class T, int kN, bool kEarlier>
struct TokenSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  static constexpr int kTargets = kEarlier ? 2 : 1;  // blocks of tokens i
  float dCB[kTargets][32];                           // (j, i), summed over heads

  // 16 columns i of a block: L o C B^T into the fragment m, L o delta o U into dCB, sums of V.
  template <bool kMasked>
  MAMBA2_DEVICE void weigh_step(uint32_t (&m)[16], Rows& rows, float (&columns)[16], HeadSums& sums,
                                int step, const float (&U)[32],
                                const float4 (&BC)[8][tile::kWarpgroup], float (&dCB)[32],
                                const float* a_log2) {
    MAMBA2_UNROLL
    for (int block8 = 2 * step; block8 < 2 * step + 2; ++block8) {
      const float4 bc4 = BC[block8][thread];
      const float bc[4] = {bc4.x, bc4.y, bc4.z, bc4.w};
      const float2 a2 = *reinterpret_cast<const float2*>(a_log2 + me.column(block8));
      float weight[4];
      MAMBA2_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int half = e >> 1, past = me.column(block8) + (e & 1) - me.row(half);
        float L = ptx::ex2((e & 1 ? a2.y : a2.x) - rows.a_log2[half]);
        if (kMasked && past < 0) L = 0;
        const float LU = L * U[4 * block8 + e];
        float V = LU * bc[e];
        weight[e] = L * bc[e];
        dCB[4 * block8 + e] += LU * rows.delta[half];
        if (kMasked && past == 0) {
          sums.diagonal[me.row(half)] = V;
          sums.dy_x[me.row(half)] = U[4 * block8 + e];
        }
        if (kMasked && past <= 0) V = 0;
        rows.V[half] += V;
        columns[2 * block8 + (e & 1)] += V * rows.delta[half];
      }
      m[2 * block8] = pack2<T>(weight[0], weight[1]);
      m[2 * block8 + 1] = pack2<T>(weight[2], weight[3]);
    }
  }
  // All of a block of tokens i.
  template <bool kDiagonal>
  MAMBA2_DEVICE void weigh(uint32_t (&m)[16], Rows& rows, HeadSums& sums, const float (&U)[32],
                           const float4 (&BC)[8][tile::kWarpgroup], float (&dCB)[32],
                           const float* a_log2) {
    float columns[16];
    MAMBA2_UNROLL
    for (int i = 0; i < 16; ++i) columns[i] = 0;
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      __syncwarp();  // keeps the compiler from loading all steps' C B^T at once: registers
      if (!kDiagonal || step > me.warp) {
        weigh_step<false>(m, rows, columns, sums, step, U, BC, dCB, a_log2);
      } else if (step == me.warp) {
        weigh_step<true>(m, rows, columns, sums, step, U, BC, dCB, a_log2);
      } else {
        MAMBA2_UNROLL
        for (int i = 0; i < 4; ++i) m[4 * step + i] = 0;
      }
    }
    column_sums(columns, sums.R[kDiagonal ? 0 : 1][me.warp], me.lane);
  }

  // U = x dy^T, all blocks of tokens i: issued.
  MAMBA2_DEVICE void multiply_tokens(float (&U)[kTargets][32], const HeadStage<T, kN>& stage) {
    uint32_t x[16];
    tile::load_fragments<4>(x, stage.x, me);
    MAMBA2_UNROLL
    for (int i = 0; i < kTargets; ++i) ptx::wgmma_fence_operand(U[i]);
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int i = 0; i < kTargets; ++i)
      tile::product_rs<T, kBlock, 4>(U[i], x, tile::KMajor<kBlock>{stage.dy[i]}, false);
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
    const int64_t own = args.head_at(task.i_chunk, head) * kBackwardQ + (kEarlier ? 0 : kBlock);
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
    const int64_t own = index * kBackwardQ + (kEarlier ? 0 : kBlock);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float V = row_sum(rows.V[half]);
      if (me.lane % 4 == 0) sums.V[me.row(half)] = V;
    }
    ptx::bar_sync(kTokenSideBarrier, tile::kWarpgroup);
    ptx::mbarrier_wait(&s.state_sums[stage_of(i_head)], phase_of(i_head));
    const int i = thread % kBlock;
    if (thread < kBlock) {
      const float (&R)[4][kBlock] = sums.R[0];
      const float Q = sums.V[i] * stage.delta[kEarlier ? i : kBlock + i];
      const float row = R[0][i] + R[1][i] + R[2][i] + R[3][i] - Q;
      args.columns[own + i] = sums.V[i] + sums.diagonal[i];
      args.rows_out[own + i] = kEarlier ? row : row + sums.E[i];
      if (kEarlier) args.later_rows[own + i] = sums.E[i];
      // (state_sweeps has written that of a last chunk)
      if (!kEarlier && i == 0 && !(task.chunk.is_last && args.d_final_states))
        args.through[index] = sums.K[0] + sums.K[1] + sums.K[2] + sums.K[3];
    } else {
      const float (&R)[4][kBlock] = sums.R[1];
      if (kEarlier) args.later_rows[own + kBlock + i] = R[0][i] + R[1][i] + R[2][i] + R[3][i];
      const float dD = args.D_per_channel
                           ? sums.dD[0][i] + sums.dD[1][i] + sums.dD[2][i] + sums.dD[3][i]
                           : sums.dy_x[i];
      const int64_t block = int64_t(task.i_chunk) * 2 + task.block;
      args.dD_blocks[(block * args.h + head) * kHeadDim + i] = dD;
    }
  }

  MAMBA2_DEVICE void head(const HeadStage<T, kN>& stage, HeadSums& sums, int i_head) {
    const float* a_log2 = stage.a_log2 + (kEarlier ? 0 : kBlock);
    const float* delta = stage.delta + (kEarlier ? 0 : kBlock);
    float U[kTargets][32], dx[32];  // dx lacks delta_j and D until the end
    uint32_t m[kTargets][16];
    multiply_tokens(U, stage);
    Rows rows;
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      rows.a_log2[half] = a_log2[me.row(half)];
      rows.delta[half] = delta[me.row(half)];
      rows.V[half] = 0;
    }
    ptx::wgmma_wait_group<0>();
    MAMBA2_UNROLL
    for (int i = 0; i < kTargets; ++i) ptx::wgmma_fence_operand(U[i]);

    if constexpr (kEarlier) weigh<false>(m[1], rows, sums, U[1], s.BC[1], dCB[1], a_log2 + kBlock);
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(dx, tile::KMajor<kBlock>{s.B},
                                           tile::KMajor<kHeadDim>{stage.G}, false);
    ptx::wgmma_commit_group();
    weigh<true>(m[0], rows, sums, U[0], s.BC[0], dCB[0], a_log2);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dx);
    weigh_state(stage, dx, rows, task.first_head + i_head);
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int i = 0; i < kTargets; ++i)
      tile::product_rs<T, kHeadDim, 4>(dx, m[i], tile::MnMajor<kBlock>{stage.dy[i]}, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dx);
    store_dx(stage, dx, rows, task.first_head + i_head);
    write_sums(stage, sums, rows, i_head);
  }

  // (C B^T)^T of the own tokens j and each block of tokens i.
  MAMBA2_DEVICE void park_BC() {
    MAMBA2_UNROLL
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
      MAMBA2_UNROLL
      for (int e = 0; e < 32; ++e) dCB[i][e] = 0;
    }
  }

  MAMBA2_DEVICE void run() {
    this->wait_group();
    park_BC();
    for (int i = 0; i < task.heads; ++i) {
      head(this->wait_head(i), s.sums[stage_of(i)], i);
      arrive_warp(&s.ring.empty[stage_of(i)], me.lane);
    }
    this->both();
    MAMBA2_UNROLL
    for (int i = 0; i < kTargets; ++i) {
      uint32_t a[16];
      tile::round_to_fragments<T>(a, dCB[i]);
      MAMBA2_UNROLL
      for (int step = 0; step < 4; ++step) {
        const uint32_t r[4] = {a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3]};
        tile::store_fragment(this->dCB_panel(i), r, step, me);
      }
    }
    this->both();
    if constexpr (kEarlier) {
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
