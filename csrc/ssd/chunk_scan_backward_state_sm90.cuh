// chunk_scan_backward (sm_90a), the state side: products with the state S that enters the chunk and
// the gradient G of the state that leaves it.
//
//   dC_i += 2^a_i S^T dy_i                            E_i = 2^a_i dy_i . (S C_i)
//   dB_j += 2^(a_q - a_j) delta_j G^T x_j             U_jj = dy_j . x_j
//
// and, after the last head, what dCB adds to dB and dC.
#pragma once
#include "chunk_scan_backward_meeting_sm90.cuh"

namespace mamba2::ssd::sm90 {

// Chunks that let through more than this have weighted tokens in two words.
constexpr float kTwoWordsChunkLog2 = -2;

template <class T, int kN, bool kSliced>
struct StateSide : ScanConsumer<T, kN> {
  using Base = ScanConsumer<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::thread;
  using Base::Base;
  using typename Base::Shape;
  float dC[kN / 2], dB[kN / 2];

  MAMBA2_DEVICE void sum_dD(const TokenStage<T>& stage, HeadResults& results) {
    float columns[16];
    MAMBA2_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t dy[4], x[4];
      tile::load_fragment(dy, stage.dy[0], step, me);
      tile::load_fragment(x, stage.x + to_folded<Shape>(me), step, me);
      MAMBA2_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const float2 x0 = unpack2<T>(x[i]), x1 = unpack2<T>(x[i + 1]);
        const float2 dy0 = unpack2<T>(dy[i]), dy1 = unpack2<T>(dy[i + 1]);
        columns[4 * step + i] = x0.x * dy0.x + x1.x * dy1.x;
        columns[4 * step + i + 1] = x0.y * dy0.y + x1.y * dy1.y;
      }
    }
    column_sums(columns, results.dD[me.warp], me.lane);
  }

  // dy_j . x_j, the diagonal of U: tensor cores take 16 by 16 tokens of both.
  MAMBA2_DEVICE void multiply_diagonal(const TokenStage<T>& stage, HeadResults& results) const {
    float upper[4] = {}, lower[4] = {};  // 16 tokens' dy by the upper, the lower 8 tokens' x
    MAMBA2_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t dy[4], x[4];
      tile::load_fragment(dy, stage.dy[0], step, me);
      tile::load_fragment(x, stage.x + to_folded<Shape>(me), step, me);
      ptx::mma_m16n8k16<T>(upper, dy, x[0], x[2]);
      ptx::mma_m16n8k16<T>(lower, dy, x[1], x[3]);
    }
    const int past = me.lane / 4 - 2 * (me.lane % 4);  // row - column of this lane's first element
    if (past != 0 && past != 1) return;
    results.dy_x[me.row(0)] = past == 0 ? upper[0] : upper[1];
    results.dy_x[me.row(1)] = past == 0 ? lower[2] : lower[3];
  }

  // S C_i, (token, p): issued.
  MAMBA2_DEVICE void multiply_state(float (&SC)[32], const StateStage<T, kN>& states) {
    ptx::wgmma_fence_operand(SC);
    ptx::wgmma_fence();
    tile::product_ss<T, kHeadDim, kN / 16>(SC, tile::KMajor<kBlock>{s.C},
                                           tile::KMajor<kHeadDim>{states.S}, false);
    ptx::wgmma_commit_group();
  }
  // d += a S or a G, of rows weighed: issued.
  MAMBA2_DEVICE void multiply_rows(float (&d)[kN / 2], const uint32_t (&a)[16], const T* states) {
    ptx::wgmma_fence_operand(d);
    ptx::wgmma_fence();
    tile::product_rs<T, kN, 4>(d, a, tile::MnMajor<kHeadDim>{states}, true);
    ptx::wgmma_commit_group();
  }
  // The second words of weighted rows: in a chunk of weak decay, what the first ones have lost is
  // most of the error of dB and dC.
  MAMBA2_DEVICE void add_second_words(const TokenStage<T>& stage, const StateStage<T, kN>& states) {
    const tile::Lane lane(32 * me.warp + ptx::laneid());  // anew: kept, it would cost registers
    const float* a_log2 = stage.a_log2 + task.block * kBlock;
    const float* delta = stage.delta + task.block * kBlock;
    float weight[2] = {ptx::ex2(a_log2[lane.row(0)]), ptx::ex2(a_log2[lane.row(1)])};
    uint32_t rest[16];
    tile::load_fragments<4>(rest, stage.dy[0], lane);
    scale_rows_rest<T>(rest, weight);
    add_product<T, kN>(dC, tile::MnMajor<kHeadDim>{states.S}, rest);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half)
      weight[half] =
          ptx::ex2(stage.a_log2[kBackwardQ - 1] - a_log2[lane.row(half)]) * delta[lane.row(half)];
    tile::load_fragments<4>(rest, stage.x + to_folded<Shape>(lane), lane);
    scale_rows_rest<T>(rest, weight);
    add_product<T, kN>(dB, tile::MnMajor<kHeadDim>{states.G}, rest);
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
    if (args.D_per_channel) sum_dD(stage, results);
    multiply_diagonal(stage, results);
    if (thread == 0) results.through = ptx::ex2(stage.a_log2[kBackwardQ - 1]);
    float E[2] = {};
    {
      float SC[32];
      multiply_state(SC, states);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(SC);
      MAMBA2_UNROLL
      for (int step = 0; step < 4; ++step) {  // of 16 channels: registers are short
        uint32_t dy[4];
        tile::load_fragment(dy, stage.dy[0], step, me);
        add_row_dots<T, 4>(E, dy, SC + 8 * step);
      }
    }
    uint32_t dy[16], x[16];
    tile::load_fragments<4>(dy, stage.dy[0], me);
    scale_rows<T>(dy, from_state);
    multiply_rows(dC, dy, states.S);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dC);
    tile::load_fragments<4>(x, stage.x + to_folded<Shape>(me), me);
    scale_rows<T>(x, to_state);
    multiply_rows(dB, x, states.G);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(E[half]) * from_state[half];
      if (me.lane % 4 == 0) results.E[me.row(half)] = sum;
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dC);
    ptx::wgmma_fence_operand(dB);
  }

  // d += dCB of the own block, as `load` has it, times B or C.
  template <class Load>
  MAMBA2_DEVICE void add_own_dCB(float (&d)[kN / 2], const T* tokens, const Load& load) {
    uint32_t a[16];
    load(a, this->dCB_panel(kOwn));
    if constexpr (Shape::kRestOfdCB) {
      uint32_t rest[16];
      load(rest, this->dCB_rest());
      add_product<T, kN>(d, tile::MnMajor<kBlock>{tokens}, a, rest);
    } else {
      add_product<T, kN>(d, tile::MnMajor<kBlock>{tokens}, a);
    }
  }
  // What dCB gives to dB, and all of it to memory.
  MAMBA2_DEVICE void finish_dB() {
    const auto load = [&](uint32_t (&a)[16], const T* panel) {
      tile::load_fragments<4>(a, panel + to_folded<Shape>(me), me);
    };
    add_own_dCB(dB, s.C, load);
    if (task.block == 0) {
      this->wait_states(task.heads);
      T* later_C = s.later_C_again(task.heads);
      if (const int valid = task.valid(args); valid < kBackwardQ) {
        clear_rows<kN>(later_C, max(0, valid - kBlock), thread, tile::kWarpgroup);
        ptx::fence_proxy_async_shared();
        ptx::bar_sync(kStateSideBarrier, tile::kWarpgroup);
      }
      uint32_t a[16];
      load(a, this->dCB_panel(kLater));
      add_product<T, kN>(dB, tile::MnMajor<kBlock>{later_C}, a);
    }
    if constexpr (!kSliced)
      this->template round<kN / 2>(args.dB, task.block, 0, dB);
    else
      this->store(kPart_dB, 0, dB);
  }
  // What dCB gives to dC.
  MAMBA2_DEVICE void finish_dC() {
    add_own_dCB(dC, s.B,
                [&](uint32_t (&a)[16], const T* panel) { tile::load_transposed<4>(a, panel, me); });
  }

  MAMBA2_DEVICE void run() {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) dC[e] = dB[e] = 0;
    ptx::mbarrier_wait(&s.group_full, 0);
    for (int i = 0; i < task.heads; ++i) {
      const TokenStage<T>& stage = this->wait_tokens(TokenSlot<kN>(i));
      const StateStage<T, kN>& states = this->wait_states(i);
      const ResultSlot<kN> slot(i);
      ptx::mbarrier_wait(&s.results_ring.empty[slot.stage], slot.phase ^ 1);
      head(stage, states, s.results[slot.stage]);
      this->results_full(slot);
      if (tile::uniform(stage.a_log2[kBackwardQ - 1] > kTwoWordsChunkLog2))
        add_second_words(stage, states);
      arrive_warp(&s.states_ring.empty[StateSlot<kN>(i).stage], me.lane);
      arrive_warp(&s.tokens_ring.empty[TokenSlot<kN>(i).stage], me.lane);
    }
    this->meet(&s.tokens_done);
    Meeting<T, kN, 2> meeting(*this, 0, !kSliced && task.block == 1);
    this->meet(&s.dCB_full);
    finish_dB();
    meeting.look();
    finish_dC();
    if constexpr (kSliced)
      this->store(kPart_dC, 0, dC);
    else if (task.block == 0)
      this->template round<kN / 2>(args.dC, 0, 0, dC);
    else
      meeting.come(dC);
  }
};

}  // namespace mamba2::ssd::sm90
