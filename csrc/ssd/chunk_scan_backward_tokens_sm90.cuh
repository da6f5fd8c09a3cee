// chunk_scan_backward (sm_90a), the two token sides: products of tokens with tokens, transposed, so
// that rows are the own tokens j and columns the tokens i >= j of the own and the later block.
//
//   U_ji = x_j . dy_i     V_ij = L_ij (C_i.B_j) U_ji     dCB_ji += L_ij delta_j U_ji
//   m_ji = L_ij (C_i.B_j)
//   dx_j = delta_j [2^(a_q - a_j) G B_j + sum_i m_ji dy_i] + D dy_j
//   R_i = sum_{j<i} V_ij delta_j     sum_{i>j} V_ij     F_j / delta_j
//
// Of a target's columns, in groups of 8, side 0 takes the even ones, side 1 the odd ones; of dx,
// side 0 takes the first half of the channels, side 1 the second. Each needs the other's m for
// that: warps that have the same rows exchange it. Both run the same instructions: they are to fit
// the cache.
#pragma once
#include "chunk_scan_backward_pairs_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN>
struct TokenSide : TokenPairs<T, kN> {
  using Base = TokenPairs<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::side;
  using Base::Base;
  using Base::BC, Base::dCB, Base::U;
  using Base::earlier, Base::group, Base::thread_anew;
  using Base::kGroups;
  using typename Base::Columns, typename Base::Fragment;
  static constexpr int kChannels = kHeadDim / 2;              // of dx
  static constexpr int kGroupRows = 8 * tile::kPanelColumns;  // from one group to the next
  int exchanges = 0;

  // ---- products ----
  // d (j, i) = a (j, k) b (i, k) of this side's columns i: issued.
  template <int kSteps>
  MAMBA2_DEVICE void multiply_columns(Columns& d, const T* a, const T* b) const {
    ptx::wgmma_fence_operand(d);
    ptx::wgmma_fence();
    tile::product_ss<T, kBlock / 2, kSteps>(d, tile::KMajor<kBlock>{a},
                                            tile::KMajor<kBlock, 2>{b + side * kGroupRows}, false);
    ptx::wgmma_commit_group();
  }
  // U of a target: issued.
  MAMBA2_DEVICE void multiply_tokens(const TokenStage<T>& stage, int target) {
    multiply_columns<4>(U, stage.x, stage.dy[target]);
  }
  // U of the own block of the head after the i-th: issued. (After the last one it is computed once
  // more and for nothing, rather than never: as many products are then always on their way.)
  MAMBA2_DEVICE void multiply_next(int i) {
    const int next = min(i + 1, task.heads - 1);
    if (next > i) this->wait_tokens(next);
    multiply_tokens(s.tokens[TokenSlot(next).stage], kOwn);
  }
  // dx = G B_j: issued.
  MAMBA2_DEVICE void multiply_state(float (&dx)[16], const StateStage<T, kN>& states) const {
    const T* G = states.G + side * kChannels * tile::kPanelColumns;
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_ss<T, kChannels, kN / 16>(dx, tile::KMajor<kBlock>{s.B},
                                            tile::KMajor<kHeadDim>{G}, false);
    ptx::wgmma_commit_group();
  }
  // dx += m dy of a target, m being this side's columns and the other's: issued.
  MAMBA2_DEVICE void multiply_weights(float (&dx)[16], const Fragment& mine, const Fragment& other,
                                      const T* dy) const {
    dy += side * kChannels;
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence();
    tile::product_rs<T, kChannels, 2>(dx, mine, tile::MnMajor<kBlock, 2>{dy + side * kGroupRows},
                                      true);
    tile::product_rs<T, kChannels, 2>(dx, other,
                                      tile::MnMajor<kBlock, 2>{dy + (1 - side) * kGroupRows}, true);
    ptx::wgmma_commit_group();
  }

  // ---- exchange ----
  // m for the other side's lane of the same rows. Two buffers: once a warp has what the other left
  // in one, and says so by coming to the next exchange, that one is free.
  MAMBA2_DEVICE void give(const Fragment& m) const {
    uint4* out = s.m[exchanges % 2][side][0] + thread_anew();
    MAMBA2_UNROLL
    for (int i = 0; i < 2; ++i)
      out[i * tile::kWarpgroup] = uint4{m[4 * i], m[4 * i + 1], m[4 * i + 2], m[4 * i + 3]};
  }
  MAMBA2_DEVICE void take(Fragment& m) {
    ptx::bar_sync(kExchangeBarriers + me.warp, 64);
    const uint4* in = s.m[exchanges % 2][1 - side][0] + thread_anew();
    MAMBA2_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint4 v = in[i * tile::kWarpgroup];
      m[4 * i] = v.x, m[4 * i + 1] = v.y, m[4 * i + 2] = v.z, m[4 * i + 3] = v.w;
    }
    ++exchanges;
  }

  // ---- a head ----
  // This side's channels of x_j or dy_j.
  MAMBA2_DEVICE void load_channels(uint32_t (&a)[2][4], const T* tile) const {
    MAMBA2_UNROLL
    for (int step = 0; step < 2; ++step) tile::load_fragment(a[step], tile, 2 * side + step, me);
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
  // G B_j becomes 2^(a_q - a_j) G B_j; its product with x_j is F_j / delta_j.
  MAMBA2_DEVICE static void weigh_state(float (&GB)[16], float (&F)[2], const uint32_t (&x)[2][4],
                                        float rest, const Rows& rows) {
    float to_state[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) to_state[half] = ptx::ex2(rest - rows.a_log2[half]);
    MAMBA2_UNROLL
    for (int e = 0; e < 16; ++e) GB[e] *= to_state[(e >> 1) & 1];
    MAMBA2_UNROLL
    for (int step = 0; step < 2; ++step) add_row_dots<T, 4>(F, x[step], GB + 8 * step);
  }
  // With two passes: the first leaves its dx (64, 64), the second adds that to its own.
  MAMBA2_DEVICE void pass_on(float (&dx)[16], int i) const {
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
  // This lane's part of dx, complete and rounded, and of the sums over its rows: to shared memory.
  MAMBA2_DEVICE void leave(const TokenStage<T>& stage, const float (&dx)[16], const Rows& rows,
                           const float (&F_parts)[2], const uint32_t (&dy)[2][4],
                           HeadResults& results, int i) const {
    float V[2], F[2];
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) V[half] = row_sum(rows.V[half]);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) F[half] = row_sum(F_parts[half]);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (me.lane % 4 == 0) {
        results.V[side][me.row(half)] = V[half];
        results.F[side][me.row(half)] = F[half];
        if (side == 0) results.delta[me.row(half)] = rows.delta[half];
      }
    }
    if (i > 0) {
      const ResultSlot last(i - 1);
      ptx::mbarrier_wait(&s.results_ring.empty[last.stage], last.phase);
    }
    MAMBA2_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float* d = dx + 8 * step + 2 * k;
        const float2 v = unpack2<T>(dy[step][k]);
        const int channel = side * kChannels + me.column(2 * step + k / 2);
        const float2 D = *reinterpret_cast<const float2*>(stage.D + channel);
        r[k] = pack2<T>(d[0] * rows.delta[k & 1] + D.x * v.x, d[1] * rows.delta[k & 1] + D.y * v.y);
      }
      tile::store_fragment(s.dx, r, 2 * side + step, me);
    }
  }
  // The i-th head, whose U of the own block is at hand; leaves that of the next head.
  MAMBA2_DEVICE void head(int i) {
    const ResultSlot slot(i);
    const TokenStage<T>& stage = s.tokens[TokenSlot(i).stage];
    HeadResults& results = s.results[slot.stage];  // free: leave() of the last head has waited
    const float* a_run_log2 = stage.a_run_log2 + task.block * kBlock;
    Rows rows = this->rows_of(stage);
    float2 a_log2[kGroups];
    this->load_decays(a_log2, a_run_log2);
    float dx[16];  // lacks delta_j and D until the end
    multiply_state(dx, this->wait_states(i));
    Fragment m, other;
    float columns[2 * kGroups], F[2] = {};
    this->weigh_own(m, rows, columns, results, a_log2, a_run_log2);
    give(m);
    uint32_t x[2][4], dy[2][4];
    load_channels(x, stage.x);
    const float rest = rest_of_chunk(stage);
    if (earlier())
      multiply_tokens(stage, kLater);
    else
      multiply_next(i);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(dx);
    arrive_warp(&s.states_ring.empty[StateSlot(i).stage], me.lane);
    weigh_state(dx, F, x, rest, rows);
    take(other);
    multiply_weights(dx, m, other, stage.dy[kOwn]);
    this->leave_columns(columns, results, kOwn);
    ptx::wgmma_wait_group<0>();  // of dx too: m is to leave its registers
    ptx::wgmma_fence_operand(dx);
    ptx::wgmma_fence_operand(U);
    if (earlier()) {
      this->weigh_later(m, rows, columns, a_run_log2 + kBlock);
      give(m);
      this->leave_columns(columns, results, kLater);
      load_channels(dy, stage.dy[kOwn]);
      take(other);
      multiply_weights(dx, m, other, stage.dy[kLater]);
      multiply_next(i);
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(dx);
    } else {
      load_channels(dy, stage.dy[kOwn]);
    }
    if (args.dx_sum) pass_on(dx, i);
    leave(stage, dx, rows, F, dy, results, i);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    this->results_full(slot);
    arrive_warp(&s.tokens_ring.empty[TokenSlot(i).stage], me.lane);
  }

  // ---- before and after all heads ----
  // (C B^T)^T of the own tokens j and each block of tokens i.
  MAMBA2_DEVICE void multiply_BC() {
    multiply_columns<kN / 16>(BC, s.B, s.C);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(BC);
    if (!earlier()) return;
    multiply_columns<kN / 16>(U, s.B, s.later_C());
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    ptx::bar_sync(kTokenSidesBarrier, 2 * tile::kWarpgroup);  // all have read later_C
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k)
      s.BC_later[side][k][thread_anew()] =
          float4{U[4 * k], U[4 * k + 1], U[4 * k + 2], U[4 * k + 3]};
  }
  MAMBA2_DEVICE void store_dCB(int target, const Columns& d) {
    Fragment a;
    tile::round_to_fragments<T>(a, d);
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; k += 2) {
      const uint32_t r[4] = {a[2 * k], a[2 * k + 1], a[2 * k + 2], a[2 * k + 3]};
      tile::store_columns(this->dCB_panel(target), r, 8 * group(k), 16, me);
    }
  }
  // What dCB gives to the later tokens' dC: each side has half of n.
  MAMBA2_DEVICE void store_later_dC() {
    constexpr int kHalf = kN / 2;
    float dC[kHalf / 2];
    MAMBA2_UNROLL
    for (float& v : dC) v = 0;
    uint32_t a[16];
    tile::load_transposed<4>(a, this->dCB_panel(kLater), me);
    const T* B = s.B + (kHalf < 64 ? side * kHalf : side * kBlock * tile::kPanelColumns);
    add_product<T, kHalf>(dC, a, tile::MnMajor<kBlock>{B});
    this->store(this->slice(args.dC_later, kBlock, 0) + side * kHalf, dC);
  }

  MAMBA2_DEVICE void run() {
    this->wait_group();
    multiply_BC();
    MAMBA2_UNROLL
    for (Columns& d : dCB) {
      MAMBA2_UNROLL
      for (float& v : d) v = 0;
    }
    multiply_tokens(this->wait_tokens(0), kOwn);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i) head(i);
    this->all();
    store_dCB(kOwn, dCB[kOwn]);
    if (earlier()) store_dCB(kLater, dCB[kLater]);
    this->all();
    if (earlier()) store_later_dC();
  }
};

}  // namespace mamba2::ssd::sm90
