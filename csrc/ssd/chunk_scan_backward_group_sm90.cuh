// chunk_scan_backward (sm_90a), the token sides before and after all heads: C B^T, which each head
// meets, and dCB, which all heads have added to.
#pragma once
#include "chunk_scan_backward_meeting_sm90.cuh"
#include "chunk_scan_backward_pairs_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kSliced, bool kResets>
struct TokenGroup : TokenPairs<T, kN> {
  using Base = TokenPairs<T, kN>;
  using Base::args, Base::me, Base::s, Base::task, Base::side;
  using Base::Base;
  using Base::BC, Base::dCB, Base::U;
  using Base::earlier, Base::group, Base::part, Base::thread_anew;
  using Base::kGroups, Base::kSharers;
  using typename Base::Columns, typename Base::Fragment, typename Base::Shape;
  static constexpr int kGroupRows = 8 * tile::kPanelColumns;  // from one group to the next

  // d (j, i) = a (j, k) b (i, k) of this side's columns i: issued.
  template <int kSteps>
  MAMBA2_DEVICE void multiply_columns(Columns& d, const T* a, const T* b) const {
    ptx::wgmma_fence_operand(d);
    ptx::wgmma_fence();
    tile::product_ss<T, kBlock / kSharers, kSteps>(
        d, tile::KMajor<kBlock>{a}, tile::KMajor<kBlock, kSharers>{b + part() * kGroupRows}, false);
    ptx::wgmma_commit_group();
  }
  // Pairs with tokens of a target that a reset parts are none: what all heads use of them, and have
  // left of them, becomes 0. Their L stays what it would be without the reset (docs/numerics.md).
  MAMBA2_DEVICE void cut_runs(Columns& d, int target) const {
    if (!kResets) return;
    MAMBA2_UNROLL
    for (int e = 0; e < 4 * kGroups; ++e) {
      const int i = me.column(group(e / 4)) + (e & 1);
      const bool parted = s.run_first[target * kBlock + i] > own_row<Shape>(me, (e >> 1) & 1);
      d[e] = parted ? 0 : d[e];
    }
  }
  // (C B^T)^T of the own tokens j and each block of tokens i: this side's columns of both.
  MAMBA2_DEVICE void multiply_BC() {
    multiply_columns<kN / 16>(BC, s.B, s.C);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(BC);
    this->cut_triangle(BC);
    cut_runs(BC, kOwn);
    if (!earlier()) return;
    multiply_columns<kN / 16>(U, s.B, s.later_C());
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(U);
    cut_runs(U, kLater);
    ptx::bar_sync(kTokenSidesBarrier, 2 * tile::kWarpgroup);  // all have read later_C
    leave_later_BC();
  }
  MAMBA2_DEVICE void leave_later_BC() {
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; ++k)
      s.BC_later[kGroups * part() + k][thread_anew()] =
          float4{U[4 * k], U[4 * k + 1], U[4 * k + 2], U[4 * k + 3]};
  }
  // All columns: side 0 the own block's, side 1 the later one's, for both.
  MAMBA2_DEVICE void share_BC() {
    if (side == 0 || earlier()) {
      multiply_columns<kN / 16>(U, s.B, side == 0 ? s.C : s.later_C());
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(U);
      cut_runs(U, side == 0 ? kOwn : kLater);
    }
    ptx::bar_sync(kTokenSidesBarrier, 2 * tile::kWarpgroup);
    if (side == 0) {
      this->cut_triangle(U);
      float4* own = this->own_BC();
      MAMBA2_UNROLL
      for (int k = 0; k < kGroups; ++k)
        if (k / 2 >= me.warp)
          own[k * 32] = float4{U[4 * k], U[4 * k + 1], U[4 * k + 2], U[4 * k + 3]};
    } else if (earlier()) {
      leave_later_BC();
    }
    ptx::bar_sync(kTokenSidesBarrier, 2 * tile::kWarpgroup);
  }
  // This side's columns to a panel.
  MAMBA2_DEVICE void store_columns(T* panel, const Fragment& a) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kGroups; k += 2) {
      const uint32_t r[4] = {a[2 * k], a[2 * k + 1], a[2 * k + 2], a[2 * k + 3]};
      tile::store_columns(panel, r, 8 * group(k), 8 * kSharers, me);
    }
  }
  // Rounded, for products; what pairs i < j have left in the own block's is none of it.
  MAMBA2_DEVICE void store_dCB(int target, Columns& d) {
    if (target == kOwn) {
      MAMBA2_UNROLL
      for (int e = 0; e < 4 * kGroups; ++e) {
        const bool before = me.column(group(e / 4)) + (e & 1) < own_row<Shape>(me, (e >> 1) & 1);
        d[e] = before ? 0 : d[e];
      }
    }
    cut_runs(d, target);
    Fragment a;
    tile::round_to_fragments<T>(a, d);
    store_columns(this->dCB_panel(target), a);
    if (target == kLater || !Shape::kRestOfdCB) return;
    MAMBA2_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) {
      const float2 kept = unpack2<T>(a[i]);
      a[i] = pack2<T>(d[2 * i] - kept.x, d[2 * i + 1] - kept.y);
    }
    store_columns(this->dCB_rest(), a);
  }
  // Adds up what both sides have of dCB: side 0 the own block's, side 1 the later one's.
  MAMBA2_DEVICE void add_dCB() {
    const int mine = side == 0 ? kOwn : kLater;
    MAMBA2_UNROLL
    for (int target = 0; target < 2; ++target) {
      float4* parts = reinterpret_cast<float4*>(s.tokens[1 + target].x) + thread_anew();
      if (target == mine) continue;
      MAMBA2_UNROLL
      for (int k = 0; k < kGroups; ++k) {
        const float* d = dCB[target] + 4 * k;
        parts[k * tile::kWarpgroup] = float4{d[0], d[1], d[2], d[3]};
      }
    }
    ptx::bar_sync(kTokenSidesBarrier, 2 * tile::kWarpgroup);
    MAMBA2_UNROLL
    for (int target = 0; target < 2; ++target) {
      const float4* parts = reinterpret_cast<const float4*>(s.tokens[1 + target].x) + thread_anew();
      if (target != mine) continue;
      MAMBA2_UNROLL
      for (int k = 0; k < kGroups; ++k) {
        const float4 v = parts[k * tile::kWarpgroup];
        float* d = dCB[target] + 4 * k;
        d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
      }
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
    Meeting<T, kN, 1> meeting(*this, side, !kSliced);
    meeting.look();
    add_product<T, kHalf>(dC, tile::MnMajor<kBlock>{B}, a);
    if constexpr (kSliced)
      this->store(kPart_later_dC, side * kHalf, dC);
    else
      meeting.come(dC);
  }

  // ---- before and after all heads ----
  MAMBA2_DEVICE void begin() {
    ptx::mbarrier_wait(&s.group_full, 0);
    if constexpr (kSharers == 2)
      multiply_BC();
    else
      share_BC();
    MAMBA2_UNROLL
    for (Columns& d : dCB) {
      MAMBA2_UNROLL
      for (float& v : d) v = 0;
    }
  }
  MAMBA2_DEVICE void end() {
    this->meet(&s.tokens_done);  // dCB goes where tokens were
    if constexpr (kSharers == 1) add_dCB();
    if (kSharers == 2 || side == 0) store_dCB(kOwn, dCB[kOwn]);
    if (earlier() && (kSharers == 2 || side == 1)) store_dCB(kLater, dCB[kLater]);
    this->meet(&s.dCB_full);
    if (earlier()) store_later_dC();
  }
};

}  // namespace mamba2::ssd::sm90
