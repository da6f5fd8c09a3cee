// chunk_scan_backward (sm_90a), the two token sides: products of tokens with tokens, transposed, so
// that rows are the own tokens j and columns the tokens i >= j of the own and the later block.
//
//   U_ji = x_j . dy_i     V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji
//   m_ji = L_ij (C_i.B_j)
//   dx_j = delta_j [2^(a_q - a_j) G B_j + sum_i m_ji dy_i] + D dy_j
//   R_i = sum_{j<i} V_ij delta_j     sum_{i>j} V_ij     F_j / delta_j
//
// At n = 128 both sides work on each head. Of a target's columns, in groups of 8, side 0 takes the
// even ones, side 1 the odd ones; of dx, side 0 takes the first half of the channels, side 1 the
// second. Each needs the other's m for that: warps that have the same rows exchange it. Rows are
// folded, so that no warp waits for one that has more of the triangle. At n = 64 each side takes
// every second head alone, rows in their order. Either way both run the same instructions: they are
// to fit the cache.
#pragma once
#include "chunk_scan_backward_group_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kSliced, bool kResets>
struct TokenSide : TokenGroup<T, kN, kSliced, kResets> {
  using Base = TokenGroup<T, kN, kSliced, kResets>;
  using Base::args, Base::me, Base::s, Base::task, Base::side;
  using Base::Base;
  using Base::earlier, Base::part, Base::thread_anew;
  using Base::kGroups, Base::kGroupRows, Base::kSharers;
  using Base::U;
  using typename Base::Fragment, typename Base::Shape;
  using TokenSlot = ssd::sm90::TokenSlot<kN>;
  using StateSlot = ssd::sm90::StateSlot<kN>;
  using ResultSlot = ssd::sm90::ResultSlot<kN>;
  static constexpr int kChannels = kHeadDim / kSharers;  // of dx
  static constexpr int kSteps = kChannels / 16;
  using Gradient = float[kChannels / 2];        // dx: an accumulator
  using ChannelFragment = uint32_t[kSteps][4];  // x or dy of the same channels

  // ---- products ----
  // U of a target: issued.
  MAMBA2_DEVICE void multiply_tokens(const TokenStage<T>& stage, int target) {
    this->template multiply_columns<4>(U, stage.x, stage.dy[target]);
  }
  // U of the own block of the head after the i-th: issued. (After the last one it is computed of
  // whatever lies there, and for nothing, rather than never: as many products are then always on
  // their way.)
  MAMBA2_DEVICE void multiply_next(int i, const TokenSlot& next) {
    if (i + 1 < task.heads) this->wait_tokens(next);
    multiply_tokens(s.tokens[next.stage], kOwn);
  }
  // dx = G B_j: issued.
  MAMBA2_DEVICE void multiply_state(Gradient& dx, const StateStage<T, kN>& states) const {
    const T* G = states.G + part() * kChannels * tile::kPanelColumns;
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kChannels, kN / 16>(dx, tile::KMajor<kBlock>{s.B + ptx::anew(0)},
                                            tile::KMajor<kHeadDim>{G}, false);
    ptx::wgmma_commit_group();
  }
  // dx += m dy of a target, m being this side's columns and the other's: issued.
  MAMBA2_DEVICE void multiply_weights(Gradient& dx, const Fragment& mine, const Fragment& other,
                                      const T* dy) const {
    dy += part() * kChannels;
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_rs<T, kChannels, 2>(dx, mine, tile::MnMajor<kBlock, 2>{dy + side * kGroupRows},
                                      true);
    tile::product_rs<T, kChannels, 2>(dx, other,
                                      tile::MnMajor<kBlock, 2>{dy + (1 - side) * kGroupRows}, true);
    ptx::wgmma_commit_group();
  }

  // ---- exchange ----
  // m for the other side's lane of the same rows. Two buffers, an exchange in each in turn: once a
  // warp has what the other left in one, and says so by coming to the next exchange, that one is
  // free.
  MAMBA2_DEVICE void give(const Fragment& m, int buffer) const {
    uint4* out = s.between.m[buffer][side][0] + thread_anew();
    MAMBA2_UNROLL
    for (int i = 0; i < 2; ++i)
      out[i * tile::kWarpgroup] = uint4{m[4 * i], m[4 * i + 1], m[4 * i + 2], m[4 * i + 3]};
  }
  MAMBA2_DEVICE void take(Fragment& m, int buffer) const {
    ptx::bar_sync(kExchangeBarriers + me.warp, 64);
    const uint4* in = s.between.m[buffer][1 - side][0] + thread_anew();
    MAMBA2_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint4 v = in[i * tile::kWarpgroup];
      m[4 * i] = v.x, m[4 * i + 1] = v.y, m[4 * i + 2] = v.z, m[4 * i + 3] = v.w;
    }
  }

  // ---- a head ----
  // This side's channels of x_j or dy_j.
  MAMBA2_DEVICE void load_x(ChannelFragment& a, const TokenStage<T>& stage) const {
    MAMBA2_UNROLL
    for (int step = 0; step < kSteps; ++step)
      tile::load_fragment(a[step], stage.x, kSteps * part() + step, me);
  }
  MAMBA2_DEVICE void load_dy(ChannelFragment& a, const TokenStage<T>& stage) const {
    const T* dy = stage.dy[kOwn] + to_unfolded<Shape>(me);
    MAMBA2_UNROLL
    for (int step = 0; step < kSteps; ++step)
      tile::load_fragment(a[step], dy, kSteps * part() + step, me);
  }
  // Log2 decay from the own block's end to the chunk's.
  MAMBA2_DEVICE float rest_of_chunk(const TokenStage<T>& stage) const {
    float rest = 0;
    if (earlier()) {
      MAMBA2_UNROLL
      for (int run = 4; run < 8; ++run) rest += run_decay(stage.a_run_log2, run);
    }
    return rest;
  }
  // G B_j becomes 2^(a_q - a_j) G B_j, 0 before the chunk's last reset; its product with x_j is
  // F_j / delta_j.
  MAMBA2_DEVICE void weigh_state(Gradient& GB, float (&F)[2], const ChannelFragment& x, float rest,
                                 const Rows& rows) const {
    float to_state[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) to_state[half] = ptx::ex2(rest - rows.a_log2[half]);
    if (kResets) {
      const int first = s.run_first[2 * kBlock - 1];
      MAMBA2_UNROLL
      for (int half = 0; half < 2; ++half)
        if (own_row<Shape>(me, half) < first) to_state[half] = 0;
    }
    MAMBA2_UNROLL
    for (int e = 0; e < kChannels / 2; ++e) GB[e] *= to_state[(e >> 1) & 1];
    MAMBA2_UNROLL
    for (int step = 0; step < kSteps; ++step) add_row_dots<T, 4>(F, x[step], GB + 8 * step);
  }
  // With two passes: the first leaves its dx (64, 64), the second adds that to its own.
  MAMBA2_DEVICE void pass_on(Gradient& dx, int i) const {
    const int64_t block = int64_t(task.i_chunk) * 2 + task.block;
    const int64_t head = block * args.h + task.first_head + i;
    float4* sum = reinterpret_cast<float4*>(args.dx_sum + head * (kBlock * kHeadDim)) +
                  side * (kBlock * kChannels / 4) + thread_anew();
    MAMBA2_UNROLL
    for (int k = 0; k < 4; ++k) {
      float* d = dx + 4 * k;
      if (args.last_pass) {
        const float4 v = sum[k * tile::kWarpgroup];
        d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
      } else {
        sum[k * tile::kWarpgroup] = make_float4(d[0], d[1], d[2], d[3]);
      }
    }
  }
  // Sums over this lane's two rows, added up by the four lanes that share them: to shared memory.
  MAMBA2_DEVICE void leave_rows(float* to, float (&sums)[2]) const {
    share_columns<1>(sums, me.lane, 1);
    const float sum = sums[0] + __shfl_xor_sync(kAllLanes, sums[0], 2);
    if ((me.lane & 2) == 0) to[own_row<Shape>(me, me.lane & 1)] = sum;
  }
  MAMBA2_DEVICE void leave_delta(const Rows& rows, HeadResults& results) const {
    const bool lower = me.lane & 1;
    if (part() == 0 && (me.lane & 2) == 0)
      results.delta[own_row<Shape>(me, lower)] = lower ? rows.delta[1] : rows.delta[0];
  }
  // Until the finishing side has read the dx that lay where the i-th head's will.
  MAMBA2_DEVICE void wait_dx(int i) const {
    ptx::mbarrier_wait(&s.dx_empty[i % Shape::kDxTiles], (i / Shape::kDxTiles + 1) & 1);
  }
  // Until it is done with the sums that lay where this head's will.
  MAMBA2_DEVICE void wait_results(const ResultSlot& slot) const {
    ptx::mbarrier_wait(&s.results_ring.empty[slot.stage], slot.phase ^ 1);
  }
  // This lane's part of dx, complete and rounded: to shared memory.
  MAMBA2_DEVICE void leave(const TokenStage<T>& stage, const Gradient& dx, const Rows& rows,
                           const ChannelFragment& dy, int i) const {
    T* to = s.dx[i % Shape::kDxTiles] + to_unfolded<Shape>(me);
    MAMBA2_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float* d = dx + 8 * step + 2 * k;
        const float2 v = unpack2<T>(dy[step][k]);
        const int channel = part() * kChannels + me.column(2 * step + k / 2);
        const float2 D = *reinterpret_cast<const float2*>(stage.D + channel);
        r[k] = pack2<T>(d[0] * rows.delta[k & 1] + D.x * v.x, d[1] * rows.delta[k & 1] + D.y * v.y);
      }
      tile::store_fragment(to, r, kSteps * part() + step, me);
    }
    ptx::fence_proxy_async_shared();
  }
  // The i-th head, shared, whose tokens are `at` that place; its U of the own block is at hand.
  // Leaves that of the next head.
  MAMBA2_DEVICE void share_head(int i, const TokenSlot& at) {
    const ResultSlot slot(i);
    const TokenSlot next = at.next();
    const TokenStage<T>& stage = s.tokens[at.stage];
    HeadResults& results = s.results[slot.stage];
    const float* a_run_log2 = stage.a_run_log2 + task.block * kBlock;
    Rows rows = this->rows_of(stage);
    const auto own = this->load_columns(a_run_log2);
    float dx[16];  // lacks delta_j and D until the end
    multiply_state(dx, this->wait_states(i));
    Fragment m, other;
    float columns[2 * kGroups], F[2] = {};
    this->weigh_own(m, rows, columns, own, a_run_log2);
    const int buffer = earlier() ? kOwn : i % 2;
    give(m, buffer);
    uint32_t x[2][4], dy[2][4];
    load_x(x, stage);
    const float rest = rest_of_chunk(stage);
    if (earlier())
      multiply_tokens(stage, kLater);
    else
      multiply_next(i, next);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(dx);
    arrive_warp(&s.states_ring.empty[StateSlot(i).stage], me.lane);
    weigh_state(dx, F, x, rest, rows);
    wait_results(slot);
    take(other, buffer);
    multiply_weights(dx, m, other, stage.dy[kOwn]);
    this->leave_columns(columns, results, kOwn);
    leave_rows(results.F[part()], F);
    wait_dx(i);                  // while the products are on their way
    ptx::wgmma_wait_group<0>();  // of dx too: m is to leave its registers
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence_operand(U);
    if (earlier()) {
      this->weigh_later(m, rows, columns, a_run_log2 + kBlock);
      give(m, kLater);
      this->leave_columns(columns, results, kLater);
      leave_rows(results.V[part()], rows.V);
      load_dy(dy, stage);
      take(other, kLater);
      multiply_weights(dx, m, other, stage.dy[kLater]);
      multiply_next(i, next);
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(dx);
    } else {
      load_dy(dy, stage);
      leave_rows(results.V[part()], rows.V);
    }
    leave_delta(rows, results);
    if (args.dx_sum) pass_on(dx, i);
    leave(stage, dx, rows, dy, i);
    me.lane = ptx::laneid();  // anew: what follows from a kept one would cost registers
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    this->results_full(slot);
    arrive_warp(&s.tokens_ring.empty[at.stage], me.lane);
  }

  // The i-th head, alone. No product is issued before there are registers for its result: the other
  // side is at a head of its own meanwhile.
  MAMBA2_DEVICE void head(int i) {
    const ResultSlot slot(i);
    const TokenStage<T>& stage = this->wait_tokens(TokenSlot(i));
    HeadResults& results = s.results[slot.stage];
    const float* a_run_log2 = stage.a_run_log2 + task.block * kBlock;
    Rows rows = this->rows_of(stage);
    const auto own = this->load_columns(a_run_log2);
    multiply_tokens(stage, kOwn);
    Fragment m, later_m;
    float columns[2 * kGroups], F[2] = {};
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    this->weigh_own(m, rows, columns, own, a_run_log2);
    wait_results(slot);
    const float rest = rest_of_chunk(stage);
    if (earlier()) {
      multiply_tokens(stage, kLater);
      this->leave_columns(columns, results, kOwn);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(U);
      this->weigh_later(later_m, rows, columns, a_run_log2 + kBlock);
    }
    Gradient dx;  // lacks delta_j and D until the end
    multiply_state(dx, this->wait_states(i));
    this->leave_columns(columns, results, earlier() ? kLater : kOwn);
    ChannelFragment channels;
    load_x(channels, stage);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dx);
    arrive_warp(&s.states_ring.empty[StateSlot(i).stage], me.lane);
    weigh_state(dx, F, channels, rest, rows);
    load_dy(channels, stage);
    ptx::wgmma_fence_operand(dx);
    const tile::MnMajor<kBlock> dy{stage.dy[kOwn]}, later_dy{stage.dy[kLater]};
    if (earlier()) {
      ptx::wgmma_fence();
      tile::product_rs<T, kHeadDim, 4>(dx, m, dy, true);
      tile::product_rs<T, kHeadDim, 4>(dx, later_m, later_dy, true);
      ptx::wgmma_commit_group();
    } else {
      ptx::wgmma_fence();
      tile::product_rs<T, kHeadDim, 4>(dx, m, dy, true);
      ptx::wgmma_commit_group();
    }
    leave_rows(results.V[part()], rows.V);
    leave_rows(results.F[part()], F);
    leave_delta(rows, results);
    wait_dx(i);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(dx);
    leave(stage, dx, rows, channels, i);
    this->results_full(slot);
    arrive_warp(&s.tokens_ring.empty[TokenSlot(i).stage], me.lane);
  }

  MAMBA2_DEVICE void run() {
    this->begin();
    if constexpr (kSharers == 2) {
      TokenSlot at(0);
      multiply_tokens(this->wait_tokens(at), kOwn);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(U);
      MAMBA2_NO_UNROLL
      for (int i = 0; i < task.heads; ++i, at = at.next()) share_head(i, at);
    } else {
      MAMBA2_NO_UNROLL
      for (int i = side; i < task.heads; i += 2) head(i);
    }
    this->end();
  }
};

}  // namespace mamba2::ssd::sm90
