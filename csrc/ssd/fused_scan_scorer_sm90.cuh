// The scorer warpgroup of fused_scan (sm_90a): C B^T once for a pair of units, then the weights
// C B^T o L o delta of each.
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class I>
struct Scorer {
  using T = typename I::T;
  static constexpr int kN = I::kN, kUnits = I::kUnits, kStages = stages_of<I>();
  using Smem = SmemOf<I>;
  using Scores = float[kQ / 2];
  const FusedScanArgs& args;
  Smem& s;
  const int thread;
  const tile::Lane me;

  MAMBA2_DEVICE Scorer(const FusedScanArgs& args, Smem& s, int thread)
      : args(args), s(s), thread(thread), me(thread) {}

  // Rows behind a packed sequence's end are the next sequence's: its NaN times 0 would be NaN.
  MAMBA2_DEVICE void clear_tail(StageOf<I>& stage, int count) const {
    for (int panel = 0; panel < kN / 64; ++panel)
      tile::zero_rows<kQ>(stage.B + panel * kQ * 64, count, thread, tile::kWarpgroup);
    for (int half = 0; half < kUnits; ++half)
      tile::zero_rows<kQ>(stage.x[half], count, thread, tile::kWarpgroup);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(1, tile::kWarpgroup);
  }
  // Below the diagonal, one block of 16 columns j of C B^T o L o delta, rounded, to shared memory
  // [i][j]. row: 2^(a_i - a_e), w: 2^(a_e - a_j) delta_j.
  MAMBA2_DEVICE void weigh_below(const float* scores, const float (&row)[2], const float2 (&w)[2],
                                 T* out, int t) const {
    uint32_t r[4];
    MAMBA2_UNROLL
    for (int i = 0; i < 4; ++i)
      r[i] = pack2<T>(scores[2 * i] * (row[i % 2] * w[i / 2].x),
                      scores[2 * i + 1] * (row[i % 2] * w[i / 2].y));
    tile::store_fragment(out, r, t, me);
  }
  // The same on the diagonal: of its four quarters, one lies above it.
  MAMBA2_DEVICE void weigh_diagonal(const float (&scores)[8], const float (&a_i)[2],
                                    const float2 (&a_j)[2], const float2 (&delta)[2],
                                    T* out) const {
    const int i = me.lane / 4, j = 2 * (me.lane % 4);
    uint32_t r[4];
    MAMBA2_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int v = k % 2, u = k / 2;  // 8 rows, 8 columns
      const float lo = scores[2 * k] * ptx::ex2(a_i[v] - a_j[u].x) * delta[u].x;
      const float hi = scores[2 * k + 1] * ptx::ex2(a_i[v] - a_j[u].y) * delta[u].y;
      const uint32_t both = pack2<T>(v > u || i >= j ? lo : 0.f, v > u || i >= j + 1 ? hi : 0.f);
      r[k] = v < u ? 0 : both;
    }
    tile::store_fragment(out, r, me.warp, me);
  }
  // The blocks of a warp's 16 rows up to the diagonal; those above it stay zero. All loads come
  // first: in flight together, and outside of the branches.
  MAMBA2_DEVICE void weigh(const Scores& scores, const float (&on_diagonal)[8],
                           Weights<T, kUnits>& weights, int half) const {
    constexpr int kBelow = kQ / 16 - 1;
    const float *a = weights.a_log2[half], *delta = weights.delta[half];
    const float a_i[2] = {a[me.row(0)], a[me.row(1)]};
    float2 w[kBelow][2], a_j[2], delta_j[2];
    float row[kBelow][2];
    MAMBA2_UNROLL
    for (int t = 0; t < kBelow; ++t) {
      MAMBA2_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int j = me.column(2 * t + u);
        w[t][u] = *reinterpret_cast<const float2*>(weights.column_weight[half] + j);
        row[t][u] = ptx::ex2(a_i[u] - a[16 * t + 15]);
      }
    }
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int j = 16 * me.warp + me.column(u);
      a_j[u] = *reinterpret_cast<const float2*>(a + j);
      delta_j[u] = *reinterpret_cast<const float2*>(delta + j);
    }
    T* out = weights.scores[half];
    weigh_diagonal(on_diagonal, a_i, a_j, delta_j, out);
    MAMBA2_UNROLL
    for (int t = 0; t < kBelow; ++t)
      if (t < me.warp) weigh_below(scores + 8 * t, row[t], w[t], out, t);
  }
  // One copy of the code for both units and all warps: the instructions of a block's roles together
  // must stay in the SM's cache.
  MAMBA2_DEVICE void weigh_units(const Scores& scores, Weights<T, kUnits>& weights) const {
    float on_diagonal[8];
    MAMBA2_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float low = me.warp & 1 ? scores[8 + e] : scores[e];
      const float high = me.warp & 1 ? scores[24 + e] : scores[16 + e];
      on_diagonal[e] = me.warp & 2 ? high : low;
    }
    MAMBA2_NO_UNROLL
    for (int half = 0; half < kUnits; ++half) weigh(scores, on_diagonal, weights, half);
  }

  MAMBA2_DEVICE void run() {
    for (int i = 0; i < kBuffers * kUnits; ++i)  // above the diagonal nothing is written again
      tile::zero_rows<kQ>(s.weights[i / kUnits].scores[i % kUnits], 0, thread, tile::kWarpgroup);
    ptx::bar_sync(1, tile::kWarpgroup);
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> to;
    for (;; at.advance(), to.advance()) {
      s.ring.wait_full(at);
      const StageInfo& info = s.info[at.stage];
      const int flags = tile::uniform(info.flags);
      if (flags & kExit) return;
      auto& stage = s.stage[at.stage];
      if (I::packed(args) && info.count < kQ) clear_tail(stage, info.count);
      if (flags & kBackwards) {
        s.decays_ring.wait_full(to);
        s.weights_ring.fill(to);
        continue;
      }
      Scores scores;
      ptx::wgmma_fence();
      tile::product_ss<T, kQ, kN / 16>(scores, tile::KMajor<kQ>{stage.C}, tile::KMajor<kQ>{stage.B},
                                       false);
      ptx::wgmma_commit_group();
      s.decays_ring.wait_full(to);  // and so the buffer is empty
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(scores);
      weigh_units(scores, s.weights[to.stage]);
      ptx::fence_proxy_async_shared();
      s.weights_ring.fill(to);
    }
  }
};

}  // namespace mamba2::ssd::sm90
