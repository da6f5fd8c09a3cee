// chunk_scan_backward (sm_90a), the state side: products with the state S that enters the chunk and
// the gradient G of the state that leaves it.
//
//   dC_i += 2^a_i S^T dy_i                            E_i = 2^a_i dy_i . (S C_i)
//   dB_j += 2^(a_q - a_j) delta_j G^T x_j             K = 2^a_q <G, S>
//
// and, after the last head, what dCB adds to dB and dC.
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kEarlier>
struct StateSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  float dC[kN / 2], dB[kN / 2];

  // K, all of it: the earlier block's token side has more pairs to do, and this side waits for it.
  MAMBA2_DEVICE float state_dot(const StateStage<T, kN>& states, float a_last_log2) const {
    float sum = 0;
    MAMBA2_NO_UNROLL
    for (int i = 0; i < kHeadDim * kN / 8 / tile::kWarpgroup; ++i) {
      const int at = i * tile::kWarpgroup + thread;
      const uint4 g = reinterpret_cast<const uint4*>(states.G)[at];
      const uint4 h = reinterpret_cast<const uint4*>(states.S)[at];
      const uint32_t gs[4] = {g.x, g.y, g.z, g.w}, hs[4] = {h.x, h.y, h.z, h.w};
      MAMBA2_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float2 u = unpack2<T>(gs[k]), v = unpack2<T>(hs[k]);
        sum += u.x * v.x;
        sum += u.y * v.y;
      }
    }
    sum = row_sum(sum);
    MAMBA2_UNROLL
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum * ptx::ex2(a_last_log2);
  }
  MAMBA2_DEVICE void sum_dD(const TokenStage<T>& stage, HeadSums& sums) {
    uint32_t dy[16], x[16];
    tile::load_fragments<4>(dy, stage.dy[0], me);
    tile::load_fragments<4>(x, stage.x, me);
    float columns[16];
    MAMBA2_UNROLL
    for (int i = 0; i < 16; i += 2) {
      const float2 x0 = unpack2<T>(x[i]), x1 = unpack2<T>(x[i + 1]);
      const float2 dy0 = unpack2<T>(dy[i]), dy1 = unpack2<T>(dy[i + 1]);
      columns[i] = x0.x * dy0.x + x1.x * dy1.x;
      columns[i + 1] = x0.y * dy0.y + x1.y * dy1.y;
    }
    column_sums(columns, sums.dD[me.warp], me.lane);
  }

  MAMBA2_DEVICE void head(const TokenStage<T>& stage, const StateStage<T, kN>& states,
                          HeadSums& sums) {
    const float* a_log2 = stage.a_log2 + task.block * kBlock;
    const float* delta = stage.delta + task.block * kBlock;
    float from_state[2], to_state[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = me.row(half);
      from_state[half] = ptx::ex2(a_log2[row]);
      to_state[half] = ptx::ex2(stage.a_log2[kBackwardQ - 1] - a_log2[row]) * delta[row];
    }
    float SC[32];  // (token, p): S C_i
    ptx::wgmma_fence_operand(SC);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(SC, tile::KMajor<kBlock>{s.C[0]},
                                           tile::KMajor<kHeadDim>{states.S}, false);
    ptx::wgmma_commit_group();
    if (args.D_per_channel) sum_dD(stage, sums);
    uint32_t dy[16], x[16];
    tile::load_fragments<4>(dy, stage.dy[0], me);
    tile::load_fragments<4>(x, stage.x, me);
    scale_rows<T>(dy, dy, from_state);
    scale_rows<T>(x, x, to_state);
    ptx::wgmma_fence_operand(dC);
    ptx::wgmma_fence_operand(dB);
    ptx::wgmma_fence();
    tile::product_rs<T, kN, 4>(dC, dy, tile::MnMajor<kHeadDim>{states.S}, true);
    ptx::wgmma_commit_group();
    tile::product_rs<T, kN, 4>(dB, x, tile::MnMajor<kHeadDim>{states.G}, true);
    ptx::wgmma_commit_group();
    if (kEarlier) {
      const float K = state_dot(states, stage.a_log2[kBackwardQ - 1]);
      if (me.lane == 0) sums.K[me.warp] = K;
    }
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(SC);
    ptx::wgmma_fence_operand(dC);
    tile::load_fragments<4>(dy, stage.dy[0], me);  // again, not kept: registers are short
    float E[2];
    row_dots<T>(E, dy, SC);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(E[half]) * from_state[half];
      if (me.lane % 4 == 0) sums.E[me.row(half)] = sum;
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dB);
  }

  MAMBA2_DEVICE void run() {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) dC[e] = dB[e] = 0;
    this->wait_group();
    for (int i = 0; i < task.heads; ++i) {
      const TokenStage<T>& stage = this->wait_tokens(i);
      head(stage, this->wait_states(i), s.sums[stage_of(i)]);
      arrive_warp(&s.head_done[stage_of(i)], me.lane);
      arrive_warp(&s.states_ring.empty[stage_of(i)], me.lane);
      arrive_warp(&s.tokens_ring.empty[stage_of(i)], me.lane);
    }
    this->both();  // no state is read any more
    this->both();  // the token side has written dCB
    uint32_t a[16];
    tile::load_transposed<4>(a, this->dCB_panel(0), me);
    add_product<T, kN>(dC, a, tile::MnMajor<kBlock>{s.B});
    tile::load_fragments<4>(a, this->dCB_panel(0), me);
    add_product<T, kN>(dB, a, tile::MnMajor<kBlock>{s.C[0]});
    if (kEarlier) {
      tile::load_fragments<4>(a, this->dCB_panel(1), me);
      add_product<T, kN>(dB, a, tile::MnMajor<kBlock>{s.C[1]});
    }
    this->store(this->slice(args.dB_slices, kBackwardQ, task.block * kBlock), dB);
    this->store(this->slice(args.dC_slices, kBackwardQ, task.block * kBlock), dC);
  }
};

}  // namespace mamba2::ssd::sm90
