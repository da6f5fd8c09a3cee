// chunk_scan_backward (sm_90a), the state side: products with the state S that enters the chunk and
// the gradient G of the state that leaves it.
//
//   dC_i += 2^a_i S^T dy_i                            E_i = 2^a_i dy_i . (S C_i)
//   dB_j += 2^(a_q - a_j) delta_j G^T x_j
//
// and, after the last head, what dCB adds to dB and dC.
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN>
struct StateSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  float dC[kN / 2], dB[kN / 2];

  MAMBA2_DEVICE void sum_dD(const TokenStage<T>& stage, HeadResults& results) {
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
    column_sums(columns, results.dD[me.warp], me.lane);
  }

  MAMBA2_DEVICE void head(const TokenStage<T>& stage, const StateStage<T, kN>& states,
                          HeadResults& results) {
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
    tile::product_ss<T, kHeadDim, kN / 16>(SC, tile::KMajor<kBlock>{s.C},
                                           tile::KMajor<kHeadDim>{states.S}, false);
    ptx::wgmma_commit_group();
    if (args.D_per_channel) sum_dD(stage, results);
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
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(SC);
    ptx::wgmma_fence_operand(dC);
    tile::load_fragments<4>(dy, stage.dy[0], me);  // again, not kept: registers are short
    float E[2];
    row_dots<T>(E, dy, SC);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(E[half]) * from_state[half];
      if (me.lane % 4 == 0) results.E[me.row(half)] = sum;
    }
    if (thread == 0) results.through = ptx::ex2(stage.a_log2[kBackwardQ - 1]);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dB);
  }

  MAMBA2_DEVICE void run() {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) dC[e] = dB[e] = 0;
    this->wait_group();
    for (int i = 0; i < task.heads; ++i) {
      const TokenStage<T>& stage = this->wait_tokens(i);
      const StateStage<T, kN>& states = this->wait_states(i);
      const ResultSlot slot(i);
      ptx::mbarrier_wait(&s.results_ring.empty[slot.stage], slot.phase ^ 1);
      head(stage, states, s.results[slot.stage]);
      arrive_warp(&s.results_ring.full[slot.stage], me.lane);
      arrive_warp(&s.states_ring.empty[StateSlot(i).stage], me.lane);
      arrive_warp(&s.tokens_ring.empty[TokenSlot(i).stage], me.lane);
    }
    this->both();  // no token is read any more
    this->both();  // the token side has written dCB
    uint32_t a[16];
    tile::load_transposed<4>(a, this->dCB_panel(0), me);
    add_product<T, kN>(dC, a, tile::MnMajor<kBlock>{s.B});
    tile::load_fragments<4>(a, this->dCB_panel(0), me);
    add_product<T, kN>(dB, a, tile::MnMajor<kBlock>{s.C});
    if (task.block == 0) {
      this->wait_states(task.heads);
      T* later_C = s.later_C_again(task.heads);
      if (const int valid = task.valid(args); valid < kBackwardQ) {
        this->template clear<kN>(later_C, max(0, valid - kBlock), thread, tile::kWarpgroup);
        ptx::fence_proxy_async_shared();
        ptx::bar_sync(kStateSideBarrier, tile::kWarpgroup);
      }
      tile::load_fragments<4>(a, this->dCB_panel(1), me);
      add_product<T, kN>(dB, a, tile::MnMajor<kBlock>{later_C});
    }
    this->store(this->slice(args.dB_slices, kBackwardQ, task.block * kBlock), dB);
    this->store(this->slice(args.dC_slices, kBackwardQ, task.block * kBlock), dC);
  }
};

}  // namespace mamba2::ssd::sm90
