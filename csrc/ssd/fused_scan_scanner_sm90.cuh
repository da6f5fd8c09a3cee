// A scanner warpgroup of fused_scan (sm_90a): one unit's chunks in order, its state in registers.
#pragma once
#include "formulas.cuh"
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Scanner {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  using State = float[kN / 2];   // (64 p, n) of one unit, an accumulator
  using Output = float[kQ / 2];  // (64 p, 64 tokens)
  using Tokens = uint32_t[kQ / 4];  // x or z of the chunk, transposed: A fragments (p, tokens)

  const FusedScanArgs& args;
  Smem& s;
  const int half, thread;
  const tile::Lane me;
  Unit unit{};
  float D[2] = {0.f, 0.f};

  MAMBA2_DEVICE Scanner(const FusedScanArgs& args, Smem& s, int half, int thread)
      : args(args), s(s), half(half), thread(thread), me(thread) {}

  MAMBA2_DEVICE void sync() const { ptx::bar_sync(kFirstScanner + half, tile::kWarpgroup); }

  // ---- the state at the ends of a run ----
  MAMBA2_DEVICE int64_t state_offset(int i_seq, int e) const {  // into (nseq, h, p, n)
    const int p = unit.p_block * kP + me.row((e >> 1) & 1), n = me.column(e / 4);
    return ((int64_t(i_seq) * args.h + unit.head) * args.p + p) * args.n + n;
  }
  MAMBA2_DEVICE float* carry(int slot) const {  // (n / 8, 128 threads, 4): in the order of registers
    return args.carry + ((int64_t(slot) * args.units + unit.index) * kP * kN) + thread * 4;
  }
  MAMBA2_DEVICE void start_sequence(State& S, int i_seq) const {
    const bool given = args.initial_states && unit.active;
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; e += 2) {
      const int64_t at = state_offset(i_seq, e);
      S[e] = given ? mamba2::load<float>(args.initial_states, at) : 0.f;
      S[e + 1] = given ? mamba2::load<float>(args.initial_states, at + 1) : 0.f;
    }
  }
  MAMBA2_DEVICE void finish_sequence(const State& S, int i_seq) const {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; e += 2)
      *reinterpret_cast<float2*>(args.final_states + state_offset(i_seq, e)) =
          make_float2(S[e], S[e + 1]);
  }
  MAMBA2_DEVICE void load_carry(State& S, const StageInfo& info) const {
    if constexpr (kStateOnly) {  // pass one: what the run adds, from nothing
      MAMBA2_UNROLL
      for (int e = 0; e < kN / 2; ++e) S[e] = 0.f;
      return;
    }
    if (!unit.active) return;
    if (args.schedule == Schedule::tickets) {
      const int* flag = args.flags + info.slot * args.units + unit.index;
      while (ptx::ld_acquire_gpu(flag) < info.segment) ptx::nanosleep(64);
    }
    const float* from = carry(info.slot);
    MAMBA2_UNROLL
    for (int i = 0; i < kN / 8; ++i) {
      const float4 v = ptx::ld_cg_v4(from + i * tile::kWarpgroup * 4);
      S[4 * i] = v.x, S[4 * i + 1] = v.y, S[4 * i + 2] = v.z, S[4 * i + 3] = v.w;
    }
  }
  MAMBA2_DEVICE void store_carry(const State& S, const StageInfo& info) const {
    float* to = carry(info.slot);
    MAMBA2_UNROLL
    for (int i = 0; i < kN / 8; ++i)
      *reinterpret_cast<float4*>(to + i * tile::kWarpgroup * 4) =
          make_float4(S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]);
    if (args.schedule == Schedule::tickets) {
      sync();
      if (thread == 0)
        ptx::st_release_gpu(args.flags + info.slot * args.units + unit.index, info.segment + 1);
    }
  }
  MAMBA2_DEVICE void begin_task(const StageInfo& info) {
    unit = unit_of(args, info.pair, half);
    if (!args.D || !unit.active) return;
    MAMBA2_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int p = unit.p_block * kP + me.row(r);
      D[r] = mamba2::load<float>(args.D, args.D_per_channel ? int64_t(unit.head) * args.p + p
                                                            : int64_t(unit.head));
    }
  }
  MAMBA2_DEVICE void enter_run(State& S, const StageInfo& info, float& through_log2) {
    if (info.flags & kBeginsTask) begin_task(info), through_log2 = 0.f;
    if (info.flags & kBeginsSequence) {
      start_sequence(S, info.i_seq);
      through_log2 = -1e30f;
    } else {
      load_carry(S, info);
    }
  }
  MAMBA2_DEVICE void leave_run(const State& S, const StageInfo& info, float through_log2) const {
    if (!unit.active) return;
    if constexpr (kStateOnly) {
      if (args.final_states) {  // ssd_segment_state: the only pass
        if (info.flags & kEndsSequence) finish_sequence(S, info.i_seq);
      } else if (info.flags & kEndsTask) {
        store_carry(S, info);
        if (thread == 0)
          args.through_log2[int64_t(info.slot) * args.units + unit.index] = through_log2;
      }
    } else if (info.flags & kEndsSequence) {
      if (args.final_states) finish_sequence(S, info.i_seq);
    } else if (args.schedule == Schedule::tickets) {
      store_carry(S, info);
    }
  }

  // ---- the steps of a chunk ----
  // w_j x_j, rounded: the A fragments of what enters the state.
  MAMBA2_DEVICE void weigh_inputs(Tokens& weighted, const Tokens& x, const float* w) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 w_k = *reinterpret_cast<const float2*>(w + me.column(k));
      MAMBA2_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 v = unpack2<T>(x[2 * k + r]);
        weighted[2 * k + r] = pack2<T>(v.x * w_k.x, v.y * w_k.y);
      }
    }
  }
  MAMBA2_DEVICE void scale_tokens(Output& Y, const float* row_decay) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 w = *reinterpret_cast<const float2*>(row_decay + me.column(k));
      Y[4 * k] *= w.x, Y[4 * k + 1] *= w.y, Y[4 * k + 2] *= w.x, Y[4 * k + 3] *= w.y;
    }
  }
  MAMBA2_DEVICE void skip_and_gate(Output& Y, const Tokens& x, const Tokens& z) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 4; ++k) {
      const float2 v = unpack2<T>(x[k]);
      Y[2 * k] += D[k & 1] * v.x, Y[2 * k + 1] += D[k & 1] * v.y;
      if constexpr (kGate) {
        const float2 gate = unpack2<T>(z[k]);
        Y[2 * k] *= silu(gate.x), Y[2 * k + 1] *= silu(gate.y);
      }
    }
  }
  // y of the chunk to global memory: one bulk store, or row by row where a neighbour follows.
  MAMBA2_DEVICE void store_y(const Output& Y, int row, int token, int count, int buffer) const {
    T* tile = s.y[buffer][half];
    tile::store_transposed<T, kQ>(tile, Y, me);
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

  // The state after the chunk, and y of the chunk into Y but for what is thread-local.
  MAMBA2_DEVICE void products(State& S, Output& Y, Tokens& x, Stage<T, kN, kGate>& stage,
                              tile::RingPosition<kBuffers> from) const {
    if constexpr (!kStateOnly) {
      uint32_t S_rounded[kN / 4];
      tile::round_to_fragments<T>(S_rounded, S);
      ptx::wgmma_fence();
      tile::product_rs<T, kQ, kN / 16>(Y, S_rounded, tile::KMajor<kQ>{stage.C}, false);
      ptx::wgmma_commit_group();
    }
    s.weights_ring.wait_full(from);
    const auto& weights = s.weights[tile::uniform(from.stage)];
    Tokens x_weighted;
    tile::load_transposed<kQ / 16>(x, stage.x[half], me);
    weigh_inputs(x_weighted, x, weights.input_weight[half]);
    const float chunk_decay = weights.row_decay[half][kQ - 1];
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) S[e] *= chunk_decay;
    ptx::wgmma_fence_operand(S);
    ptx::wgmma_fence();
    tile::product_rs<T, kN, kQ / 16>(S, x_weighted, tile::MnMajor<kQ>{stage.B}, true);
    ptx::wgmma_commit_group();
    if constexpr (!kStateOnly) {
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(Y);
      tile::load_transposed<kQ / 16>(x, stage.x[half], me);  // again: registers are scarce above
      scale_tokens(Y, weights.row_decay[half]);
      ptx::wgmma_fence_operand(Y);
      ptx::wgmma_fence();
      tile::product_rs<T, kQ, kQ / 16>(Y, x, tile::KMajor<kQ>{weights.scores[half]}, true);
      ptx::wgmma_commit_group();
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(S);
    if constexpr (!kStateOnly) ptx::wgmma_fence_operand(Y);
  }

  MAMBA2_DEVICE void run() {
    State S;
    float through_log2 = 0.f;  // of the run, pass one
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> from;
    for (;; at.advance(), from.advance()) {
      s.ring.wait_full(at);
      const int4 info = *reinterpret_cast<const int4*>(&s.info[at.stage]);
      const int flags = tile::uniform(info.x);
      if (flags & kExit) break;
      if (flags & (kBeginsTask | kBeginsSequence)) enter_run(S, s.info[at.stage], through_log2);
      auto& stage = s.stage[tile::uniform(at.stage)];
      if constexpr (kStateOnly) through_log2 += stage.a_log2[half][kQ - 1];
      Output Y;
      Tokens x, z;
      products(S, Y, x, stage, from);
      if constexpr (kGate && !kStateOnly) tile::load_transposed<kQ / 16>(z, stage.z[half], me);
      s.weights_ring.release(from);
      if (flags & (kEndsTask | kEndsSequence)) leave_run(S, s.info[at.stage], through_log2);
      s.ring.release(at);
      if constexpr (!kStateOnly) {
        skip_and_gate(Y, x, z);
        store_y(Y, info.y, info.z, info.w, from.stage);
      }
    }
    if (!kStateOnly && thread == 0) ptx::bulk_wait_group<0>();
  }
};

}  // namespace mamba2::ssd::sm90
