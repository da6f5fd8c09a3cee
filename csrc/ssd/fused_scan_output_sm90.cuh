// An output warpgroup of fused_scan (sm_90a): y of one unit, chunk after chunk.
#pragma once
#include "formulas.cuh"
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, int kStages>
struct Output {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  using Tile = float[kQ / 2];  // (64 i, 64 j) or (64 tokens, 64 p), an accumulator
  using Fragments = uint32_t[kQ / 4];

  const FusedScanArgs& args;
  Smem& s;
  const int half, thread;
  const tile::Lane me;
  Unit unit{};

  MAMBA2_DEVICE Output(const FusedScanArgs& args, Smem& s, int half, int thread)
      : args(args), s(s), half(half), thread(thread), me(thread) {}

  MAMBA2_DEVICE void sync() const { ptx::bar_sync(kBarrierOutput + half, tile::kWarpgroup); }

  MAMBA2_DEVICE void begin_task(int pair) {
    unit = unit_of(args, pair, half);
    sync();  // the last task's D is read
    if (thread < kP) {
      const int64_t at = args.D_per_channel ? int64_t(unit.head) * args.p + unit.p_block * kP + thread
                                            : int64_t(unit.head);
      s.D[half][thread] = args.D && unit.active ? mamba2::load<float>(args.D, at) : 0.f;
    }
    sync();
  }

  // One block of 16 columns j of C B^T o L o delta, rounded: a step of A fragments.
  template <bool kDiagonal>
  MAMBA2_DEVICE void weigh_block(uint32_t* r, const float* scores, const float (&a_i)[2],
                                 const float* a, const float* delta, int t) const {
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int j = me.column(2 * t + u);
      const float2 a_j = *reinterpret_cast<const float2*>(a + j);
      const float2 d_j = *reinterpret_cast<const float2*>(delta + j);
      MAMBA2_UNROLL
      for (int v = 0; v < 2; ++v) {
        const int i = me.row(v), e = 4 * u + 2 * v;
        const float lo = scores[e] * ptx::ex2(a_i[v] - a_j.x) * d_j.x;
        const float hi = scores[e + 1] * ptx::ex2(a_i[v] - a_j.y) * d_j.y;
        r[2 * u + v] = kDiagonal ? pack2<T>(i >= j ? lo : 0.f, i >= j + 1 ? hi : 0.f)
                                 : pack2<T>(lo, hi);
      }
    }
  }
  // C B^T o L o delta: zero above the diagonal.
  MAMBA2_DEVICE void weigh(Fragments& weights, const Tile& scores, const float (&a_i)[2],
                           const Stage<T, kN, kGate>& stage) const {
    const float *a = stage.a_log2[half], *delta = stage.delta[half];
    MAMBA2_UNROLL
    for (int t = 0; t < kQ / 16; ++t) {
      if (t < me.warp) {
        weigh_block<false>(weights + 4 * t, scores + 8 * t, a_i, a, delta, t);
      } else if (t == me.warp) {
        weigh_block<true>(weights + 4 * t, scores + 8 * t, a_i, a, delta, t);
      } else {
        MAMBA2_UNROLL
        for (int r = 0; r < 4; ++r) weights[4 * t + r] = 0;
      }
    }
  }
  // Y += D x, and the gate: x and z in the layout of Y.
  MAMBA2_DEVICE void skip_and_gate(Tile& Y, const Fragments& x, const Fragments& z) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 D = *reinterpret_cast<const float2*>(s.D[half] + me.column(k));
      MAMBA2_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 v = unpack2<T>(x[2 * k + r]);
        float2 y = make_float2(Y[4 * k + 2 * r] + D.x * v.x, Y[4 * k + 2 * r + 1] + D.y * v.y);
        if constexpr (kGate) {
          const float2 gate = unpack2<T>(z[2 * k + r]);
          y.x *= silu(gate.x), y.y *= silu(gate.y);
        }
        Y[4 * k + 2 * r] = y.x, Y[4 * k + 2 * r + 1] = y.y;
      }
    }
  }
  // y of the chunk to global memory: one bulk store, or row by row where a neighbour follows.
  MAMBA2_DEVICE void store_y(const Tile& Y, int row, int token, int count, int buffer) const {
    T* tile = s.y[buffer][half];
    MAMBA2_UNROLL
    for (int k = 0; k < kP / 16; ++k) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = pack2<T>(Y[8 * k + 2 * i], Y[8 * k + 2 * i + 1]);
      tile::store_fragment(tile, r, k, me);
    }
    if (thread == 0) ptx::bulk_wait_group_read<0>();  // the other buffer is free after sync
    ptx::fence_proxy_async_shared();
    sync();
    if (!args.chunking.table || count == kQ) {
      if (thread == 0 && unit.active) {
        ptx::tma_store_4d(&args.y, unit.p_block * kP, unit.head, token, row, tile);
        ptx::bulk_commit_group();
      }
      return;
    }
    T* y = static_cast<T*>(args.y_out.ptr) + token * args.y_out.l + unit.head * args.y_out.h +
           unit.p_block * kP;
    for (int i = thread; i < (unit.active ? count * 8 : 0); i += tile::kWarpgroup)
      *reinterpret_cast<uint4*>(y + i / 8 * args.y_out.l + i % 8 * 8) =
          *static_cast<const uint4*>(tile::panel_address(tile, i / 8, i % 8 * 8));
    sync();  // the buffer is read by ordinary loads here, which no bulk group tracks
  }

  // Y = 2^a_i C S^T + (C B^T o L o delta) x
  MAMBA2_DEVICE void products(Tile& Y, const Stage<T, kN, kGate>& stage,
                              const tile::RingPosition<1>& from) const {
    const tile::KMajor<kQ> C{stage.C}, B{stage.B};
    Tile scores;
    ptx::wgmma_fence();
    tile::product_ss<T, kQ, kN / 16>(scores, C, B, false);
    ptx::wgmma_commit_group();
    const float a_i[2] = {stage.a_log2[half][me.row(0)], stage.a_log2[half][me.row(1)]};
    s.state_ring[half].wait_full(from);
    ptx::wgmma_fence();
    tile::product_ss<T, kP, kN / 16>(Y, C, tile::KMajor<kP>{s.state[half]}, false);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_fence_operand(scores);
    Fragments weights;
    weigh(weights, scores, a_i, stage);
    const float row_decay[2] = {ptx::ex2(a_i[0]), ptx::ex2(a_i[1])};
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(Y);
    s.state_ring[half].release(from);
    MAMBA2_UNROLL
    for (int e = 0; e < kQ / 2; ++e) Y[e] *= row_decay[(e >> 1) & 1];
    ptx::wgmma_fence_operand(Y);
    ptx::wgmma_fence();
    tile::product_rs<T, kP, kQ / 16>(Y, weights, tile::MnMajor<kQ>{stage.x[half]}, true);
    ptx::wgmma_commit_group();
  }

  MAMBA2_DEVICE void run() {
    tile::RingPosition<kStages> at;
    tile::RingPosition<1> from;
    tile::RingPosition<kBuffers> to;
    for (;; at.advance(), from.advance(), to.advance()) {
      s.ring.wait_full(at);
      const StageInfo& in_stage = s.info[tile::uniform(at.stage)];
      const int4 info = *reinterpret_cast<const int4*>(&in_stage);  // flags, row, token, count
      const int flags = tile::uniform(info.x);
      if (flags & kExit) break;
      if (flags & kBeginsTask) begin_task(in_stage.pair);
      if (args.chunking.table && info.w < kQ)
        ptx::bar_sync(kBarrierTail, (1 + kUnits) * tile::kWarpgroup);
      auto& stage = s.stage[tile::uniform(at.stage)];
      Tile Y;
      Fragments x, z;
      products(Y, stage, from);
      tile::load_fragments<kQ / 16>(x, stage.x[half], me);
      if constexpr (kGate) tile::load_fragments<kQ / 16>(z, stage.z[half], me);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(Y);
      s.ring.release(at);
      skip_and_gate(Y, x, z);
      store_y(Y, info.y, info.z, info.w, to.stage);
    }
    if (thread == 0) ptx::bulk_wait_group<0>();
  }
};

}  // namespace mamba2::ssd::sm90
