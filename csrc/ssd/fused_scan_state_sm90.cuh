// The state warpgroup of fused_scan (sm_90a): the states of a pair of units, chunk after chunk.
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct StateKeeper {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  using State = float[kN / 2];      // (64 p, n) of one unit, an accumulator
  using Tokens = uint32_t[kQ / 4];  // x of the chunk, transposed: A fragments (p, tokens)

  const FusedScanArgs& args;
  Smem& s;
  const int thread;
  const tile::Lane me;
  Unit unit[kUnits] = {};

  MAMBA2_DEVICE StateKeeper(const FusedScanArgs& args, Smem& s, int thread)
      : args(args), s(s), thread(thread), me(thread) {}

  MAMBA2_DEVICE void sync() const { ptx::bar_sync(kBarrierState, tile::kWarpgroup); }

  // ---- the states at the ends of a run ----
  MAMBA2_DEVICE int64_t state_offset(const Unit& u, int i_seq, int e) const {  // (nseq, h, p, n)
    const int p = u.p_block * kP + me.row((e >> 1) & 1), n = me.column(e / 4);
    return ((int64_t(i_seq) * args.h + u.head) * args.p + p) * args.n + n;
  }
  MAMBA2_DEVICE float* carry(const Unit& u, int slot) const {  // (n / 8, 128 threads, 4)
    return args.carry + ((int64_t(slot) * args.units + u.index) * kP * kN) + thread * 4;
  }
  MAMBA2_DEVICE void start_sequence(State& S, const Unit& u, int i_seq) const {
    const bool given = args.initial_states && u.active;
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; e += 2) {
      const int64_t at = state_offset(u, i_seq, e);
      S[e] = given ? mamba2::load<float>(args.initial_states, at) : 0.f;
      S[e + 1] = given ? mamba2::load<float>(args.initial_states, at + 1) : 0.f;
    }
  }
  MAMBA2_DEVICE void finish_sequence(const State& S, const Unit& u, int i_seq) const {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; e += 2)
      *reinterpret_cast<float2*>(args.final_states + state_offset(u, i_seq, e)) =
          make_float2(S[e], S[e + 1]);
  }
  MAMBA2_DEVICE void load_carry(State& S, const Unit& u, const StageInfo& info) const {
    if (kStateOnly || !u.active) {  // pass one: what the run adds, from nothing
      MAMBA2_UNROLL
      for (int e = 0; e < kN / 2; ++e) S[e] = 0.f;
      return;
    }
    if (args.schedule == Schedule::tickets) {
      const int* flag = args.flags + info.slot * args.units + u.index;
      while (ptx::ld_acquire_gpu(flag) < info.segment) ptx::nanosleep(64);
    }
    const float* from = carry(u, info.slot);
    MAMBA2_UNROLL
    for (int i = 0; i < kN / 8; ++i) {
      const float4 v = ptx::ld_cg_v4(from + i * tile::kWarpgroup * 4);
      S[4 * i] = v.x, S[4 * i + 1] = v.y, S[4 * i + 2] = v.z, S[4 * i + 3] = v.w;
    }
  }
  MAMBA2_DEVICE void store_carry(const State& S, const Unit& u, const StageInfo& info) const {
    float* to = carry(u, info.slot);
    MAMBA2_UNROLL
    for (int i = 0; i < kN / 8; ++i)
      *reinterpret_cast<float4*>(to + i * tile::kWarpgroup * 4) =
          make_float4(S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]);
    if (args.schedule == Schedule::tickets) {
      sync();
      if (thread == 0)
        ptx::st_release_gpu(args.flags + info.slot * args.units + u.index, info.segment + 1);
    }
  }
  MAMBA2_DEVICE void enter_run(State (&S)[kUnits], const StageInfo& info, float* through_log2) {
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half) {
      if (info.flags & kBeginsTask) {
        unit[half] = unit_of(args, info.pair, half);
        through_log2[half] = 0.f;
      }
      if (info.flags & kBeginsSequence) {
        start_sequence(S[half], unit[half], info.i_seq);
        through_log2[half] = -1e30f;
      } else {
        load_carry(S[half], unit[half], info);
      }
    }
  }
  MAMBA2_DEVICE void leave_run(const State& S, const Unit& u, const StageInfo& info,
                               float through_log2) const {
    if (!u.active) return;
    if constexpr (kStateOnly) {
      if (args.final_states) {  // ssd_segment_state: the only pass
        if (info.flags & kEndsSequence) finish_sequence(S, u, info.i_seq);
      } else if (info.flags & kEndsTask) {
        store_carry(S, u, info);
        if (thread == 0) args.through_log2[int64_t(info.slot) * args.units + u.index] = through_log2;
      }
    } else if (info.flags & kEndsSequence) {
      if (args.final_states) finish_sequence(S, u, info.i_seq);
    } else if (args.schedule == Schedule::tickets) {
      store_carry(S, u, info);
    }
  }

  // ---- the steps of a chunk ----
  // Rows behind a packed sequence's end are the next sequence's: its NaN times 0 would be NaN.
  MAMBA2_DEVICE void clear_tail(Stage<T, kN, kGate>& stage, int count) const {
    for (int panel = 0; panel < kN / 64; ++panel)
      tile::zero_rows<kQ>(stage.B + panel * kQ * 64, count, thread, tile::kWarpgroup);
    for (int half = 0; half < kUnits; ++half)
      tile::zero_rows<kQ>(stage.x[half], count, thread, tile::kWarpgroup);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kBarrierTail, (kStateOnly ? 1 : 1 + kUnits) * tile::kWarpgroup);
  }
  // The state entering the chunk, rounded, to the output warpgroup.
  MAMBA2_DEVICE void publish(const State& S, int half, const tile::RingPosition<1>& to) const {
    s.state_ring[half].wait_empty(to);
    MAMBA2_UNROLL
    for (int k = 0; k < kN / 16; ++k) {
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = pack2<T>(S[8 * k + 2 * i], S[8 * k + 2 * i + 1]);
      tile::store_fragment(s.state[half] + k / 4 * kP * 64, r, k % 4, me);
    }
    ptx::fence_proxy_async_shared();
    s.state_ring[half].fill(to);
  }
  MAMBA2_DEVICE void input_weights(const Stage<T, kN, kGate>& stage) const {
    const int half = thread / kQ, t = thread % kQ;
    const float a = stage.a_log2[half][t], a_q = stage.a_log2[half][kQ - 1];
    s.input_weight[half][t] = ptx::ex2(a_q - a) * stage.delta[half][t];
    sync();
  }
  // w_j x_j, rounded: the A fragments of what enters the state.
  MAMBA2_DEVICE void weigh_inputs(Tokens& weighted, const T* x, const float* w) const {
    tile::load_transposed<kQ / 16>(weighted, x, me);
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 w_k = *reinterpret_cast<const float2*>(w + me.column(k));
      MAMBA2_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 v = unpack2<T>(weighted[2 * k + r]);
        weighted[2 * k + r] = pack2<T>(v.x * w_k.x, v.y * w_k.y);
      }
    }
  }
  MAMBA2_DEVICE void update(State (&S)[kUnits], const Stage<T, kN, kGate>& stage) const {
    Tokens x[kUnits];
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half) {
      weigh_inputs(x[half], stage.x[half], s.input_weight[half]);
      const float decay = ptx::ex2(stage.a_log2[half][kQ - 1]);
      MAMBA2_UNROLL
      for (int e = 0; e < kN / 2; ++e) S[half][e] *= decay;
      ptx::wgmma_fence_operand(S[half]);
    }
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half)
      tile::product_rs<T, kN, kQ / 16>(S[half], x[half], tile::MnMajor<kQ>{stage.B}, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half) ptx::wgmma_fence_operand(S[half]);
  }

  MAMBA2_DEVICE void run() {
    State S[kUnits];
    float through_log2[kUnits];  // of the run, pass one
    tile::RingPosition<kStages> at;
    tile::RingPosition<1> to;
    for (;; at.advance(), to.advance()) {
      s.ring.wait_full(at);
      const StageInfo& info = s.info[tile::uniform(at.stage)];
      const int flags = tile::uniform(info.flags);
      if (flags & kExit) break;
      auto& stage = s.stage[tile::uniform(at.stage)];
      if (args.chunking.table && info.count < kQ) clear_tail(stage, info.count);
      if (flags & (kBeginsTask | kBeginsSequence)) enter_run(S, info, through_log2);
      if constexpr (!kStateOnly) {
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half) publish(S[half], half, to);
      }
      input_weights(stage);
      if constexpr (kStateOnly) {
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half)
          through_log2[half] += stage.a_log2[half][kQ - 1];
      }
      update(S, stage);
      if (flags & (kEndsTask | kEndsSequence)) {
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half)
          leave_run(S[half], unit[half], info, through_log2[half]);
      }
      s.ring.release(at);
      sync();  // input_weight is free
    }
  }
};

}  // namespace mamba2::ssd::sm90
