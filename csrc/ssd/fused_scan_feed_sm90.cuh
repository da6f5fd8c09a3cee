// The loader, the decays and the scorer of fused_scan (sm_90a): what feeds the scanners.
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Loader {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  const FusedScanArgs& args;
  Smem& s;
  tile::RingPosition<kStages> at;

  MAMBA2_DEVICE void load(const Unit (&units)[kUnits], const Chunk& c, int i_chunk) {
    auto& stage = s.stage[at.stage];
    ptx::Mbarrier* full = &s.ring.full[at.stage];
    const int active = units[1].active ? 2 : 1, group = units[0].group;
    const uint32_t tile_bytes = kQ * kP * sizeof(T), scalar_bytes = kQ * sizeof(float);
    ptx::mbarrier_arrive_expect_tx(full, (kStateOnly ? 1 : 2) * kQ * kN * sizeof(T) +
                                             active * (tile_bytes * (1 + kGate) + 2 * scalar_bytes));
    MAMBA2_UNROLL
    for (int panel = 0; panel < kN / 64; ++panel) {
      const int offset = panel * kQ * 64;
      ptx::tma_load_4d(stage.B + offset, &args.B, panel * 64, group, c.token, c.row, full);
      if constexpr (!kStateOnly)
        ptx::tma_load_4d(stage.C + offset, &args.C, panel * 64, group, c.token, c.row, full);
    }
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half) {
      const Unit u = units[half];
      if (!u.active) break;
      ptx::tma_load_4d(stage.x[half], &args.x, u.p_block * kP, u.head, c.token, c.row, full);
      if constexpr (kGate)
        ptx::tma_load_4d(stage.z[half], &args.z, u.p_block * kP, u.head, c.token, c.row, full);
      const int64_t scalars = (int64_t(i_chunk) * args.h + u.head) * kQ;
      ptx::bulk_load(stage.a_log2[half], args.a_cumsum_log2 + scalars, scalar_bytes, full);
      ptx::bulk_load(stage.delta[half], args.delta + scalars, scalar_bytes, full);
    }
  }

  MAMBA2_DEVICE void run() {
    ptx::griddepcontrol_wait();  // what all blocks read goes through this thread's loads
    int ticket = ptx::atom_add_relaxed_gpu(args.ticket, 1);
    while (ticket < args.tasks) {
      const int next = ptx::atom_add_relaxed_gpu(args.ticket, 1);
      const Task task = task_of(args, ticket);
      const Unit units[kUnits] = {unit_of(args, task.pair, 0), unit_of(args, task.pair, 1)};
      for (int i = task.begin; i < task.end; ++i) {
        const Chunk c = args.chunking.at(i);
        if (c.i_seq < 0) break;
        const bool ends = i + 1 == task.end || args.chunking.at(i + 1).i_seq < 0;
        const int flags = (i == task.begin ? kBeginsTask : 0) | (ends ? kEndsTask : 0) |
                          (c.i_c == 0 ? kBeginsSequence : 0) | (c.is_last ? kEndsSequence : 0);
        s.ring.wait_empty(at);
        s.info[at.stage] = {flags, c.row, c.token, c.count, c.i_seq, task.pair, task.slot, task.segment};
        load(units, c, i);
        at.advance();
      }
      ticket = next;
    }
    s.ring.wait_empty(at);
    s.info[at.stage].flags = kExit;
    s.ring.fill(at);
  }
};

// One warp beside the loader. For every token one exponential of each kind:
//   2^a_i for the rows of S C^T, 2^(a_q - a_j) delta_j for what enters the state, and
//   2^(a_e - a_j) delta_j up to the end e of the token's block of 16, for the blocks below the
//   diagonal: with 2^(a_i - a_e) of the row, both factors are at most 1.
template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Decays {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  Smem& s;
  const int lane;

  MAMBA2_DEVICE void run() {
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> to;
    for (;; at.advance(), to.advance()) {
      s.ring.wait_full(at);
      if (s.info[at.stage].flags & kExit) return;
      const auto& stage = s.stage[at.stage];
      auto& weights = s.weights[to.stage];
      s.weights_ring.wait_empty(to);
      MAMBA2_UNROLL
      for (int i = 0; i < kUnits * kQ / 32; ++i) {
        const int half = i / (kQ / 32), t = i % (kQ / 32) * 32 + lane;
        const float a = stage.a_log2[half][t], delta = stage.delta[half][t];
        const float a_block = stage.a_log2[half][t | 15], a_q = stage.a_log2[half][kQ - 1];
        weights.row_decay[half][t] = ptx::ex2(a);
        weights.input_weight[half][t] = ptx::ex2(a_q - a) * delta;
        weights.column_weight[half][t] = ptx::ex2(a_block - a) * delta;
      }
      s.decays_ring.fill(to);
      s.weights_ring.fill(to);
      s.ring.release(at);
    }
  }
};

template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Scorer {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  const FusedScanArgs& args;
  Smem& s;
  const int thread;
  const tile::Lane me;

  MAMBA2_DEVICE Scorer(const FusedScanArgs& args, Smem& s, int thread)
      : args(args), s(s), thread(thread), me(thread) {}

  // Rows behind a packed sequence's end are the next sequence's: its NaN times 0 would be NaN.
  MAMBA2_DEVICE void clear_tail(Stage<T, kN, kGate>& stage, int count) const {
    for (int panel = 0; panel < kN / 64; ++panel)
      tile::zero_rows<kQ>(stage.B + panel * kQ * 64, count, thread, tile::kWarpgroup);
    for (int half = 0; half < kUnits; ++half)
      tile::zero_rows<kQ>(stage.x[half], count, thread, tile::kWarpgroup);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(1, tile::kWarpgroup);
  }
  // One block of 16 columns j of C B^T o L o delta, rounded, to shared memory [i][j]; below the
  // diagonal, and on it.
  MAMBA2_DEVICE void weigh_below(const float* scores, const float (&a_i)[2], const float* a,
                                 const float* column_weight, T* out, int t) const {
    const float a_block = a[16 * t + 15];
    const float row[2] = {ptx::ex2(a_i[0] - a_block), ptx::ex2(a_i[1] - a_block)};
    uint32_t r[4];
    MAMBA2_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float2 w = *reinterpret_cast<const float2*>(column_weight + me.column(2 * t + u));
      MAMBA2_UNROLL
      for (int v = 0; v < 2; ++v)
        r[2 * u + v] = pack2<T>(scores[4 * u + 2 * v] * (row[v] * w.x),
                                scores[4 * u + 2 * v + 1] * (row[v] * w.y));
    }
    tile::store_fragment(out, r, t, me);
  }
  MAMBA2_DEVICE void weigh_diagonal(const float* scores, const float (&a_i)[2], const float* a,
                                    const float* delta, T* out, int t) const {
    uint32_t r[4];
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
        r[2 * u + v] = pack2<T>(i >= j ? lo : 0.f, i >= j + 1 ? hi : 0.f);
      }
    }
    tile::store_fragment(out, r, t, me);
  }
  // The blocks of a warp's 16 rows up to the diagonal; those above it stay zero.
  MAMBA2_DEVICE void weigh(const float (&scores)[kQ / 2], const Stage<T, kN, kGate>& stage,
                           Weights<T>& weights, int half) const {
    const float* a = stage.a_log2[half];
    const float a_i[2] = {a[me.row(0)], a[me.row(1)]};
    MAMBA2_UNROLL
    for (int t = 0; t < kQ / 16; ++t) {
      T* out = weights.scores[half];
      if (t < me.warp) weigh_below(scores + 8 * t, a_i, a, weights.column_weight[half], out, t);
      if (t == me.warp) weigh_diagonal(scores + 8 * t, a_i, a, stage.delta[half], out, t);
    }
  }

  MAMBA2_DEVICE void run() {
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> to;
    for (;; at.advance(), to.advance()) {
      s.ring.wait_full(at);
      const StageInfo& info = s.info[at.stage];
      if (info.flags & kExit) return;
      auto& stage = s.stage[tile::uniform(at.stage)];
      if (args.chunking.table && info.count < kQ) clear_tail(stage, info.count);
      float scores[kQ / 2];
      if constexpr (!kStateOnly) {
        ptx::wgmma_fence();
        tile::product_ss<T, kQ, kN / 16>(scores, tile::KMajor<kQ>{stage.C},
                                         tile::KMajor<kQ>{stage.B}, false);
        ptx::wgmma_commit_group();
      }
      s.decays_ring.wait_full(to);  // and so the buffer is empty
      if constexpr (!kStateOnly) {
        auto& weights = s.weights[tile::uniform(to.stage)];
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_fence_operand(scores);
        MAMBA2_NO_UNROLL
        for (int half = 0; half < kUnits; ++half) weigh(scores, stage, weights, half);
        ptx::fence_proxy_async_shared();
      }
      s.weights_ring.fill(to);
      s.ring.release(at);
    }
  }
};

}  // namespace mamba2::ssd::sm90
