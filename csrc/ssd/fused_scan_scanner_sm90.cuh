// A scanner warpgroup of fused_scan (sm_90a): one unit's chunks in order, its state in registers.
// With n = 256 two scanners share a unit: each has half the columns of the state and finishes y of
// half the tokens; what its columns give to y of the other tokens goes to the other scanner, which
// adds it under its next chunk's first product. Each takes its own tokens first.
#pragma once
#include "formulas.cuh"
#include "fused_scan_ends_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class I>
struct Scanner : StateEnds<I> {
  using T = typename I::T;
  using Smem = SmemOf<I>;
  using Ends = StateEnds<I>;
  static constexpr int kN = I::kN, kStages = stages_of<I>();
  static constexpr bool kGate = I::kGate;
  using Ends::args, Ends::unit, Ends::half, Ends::part, Ends::thread, Ends::me, Ends::D;
  using Ends::kUnits, Ends::kParts, Ends::kColumns;
  using typename Ends::State;
  static constexpr int kTokens = kQ / kParts;
  using Output = float[kTokens / 2];             // (64 p, tokens of one scanner)
  using OwnTokens = uint32_t[kTokens / 4];       // of x, y or z: A fragments (p, own tokens)
  using OwnDecays = float4[kTokens / 16];        // 2^a_i
  using Tokens = uint32_t[kParts][kTokens / 4];  // of x, the own ones first
  struct Rounded {                               // What is left of a chunk when the next begins:
    OwnTokens y;                                 // y,
  };
  struct Unfinished {
    Output y;          // or, until the other scanner's part is added,
    OwnDecays decays;  // also its weights
    OwnTokens z;       // and what gates it.
  };
  using Before = std::conditional_t<kParts == 1, Rounded, Unfinished>;

  Smem& s;
  tile::RingPosition<1> exchanged{};

  MAMBA2_DEVICE Scanner(const FusedScanArgs& args, Smem& s, int scanner, int thread)
      : Ends(args, scanner, thread), s(s) {}

  // ---- the steps of a chunk ----
  // The first token of the own ones (i = 0) or of the other scanner's.
  MAMBA2_DEVICE int first_token(int i) const { return kParts == 1 ? 0 : kTokens * (part ^ i); }

  MAMBA2_DEVICE void load_tokens(Tokens& x, const T* s_x) const {
    MAMBA2_UNROLL
    for (int i = 0; i < kParts; ++i)
      tile::load_transposed<kTokens / 16>(x[i], s_x + first_token(i) * kP, me);
  }
  // w_j x_j, rounded: the A fragments of what enters the state. decay: what is left of it later.
  template <bool kDecays>
  MAMBA2_DEVICE void weigh_inputs(Tokens& weighted, const Tokens& x,
                                  const TokenValues& input_weight, float decay = 1.f) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kParts * kTokens / 16; ++k) {
      const int part_of = k / (kTokens / 16), step = k % (kTokens / 16);
      float4 w = input_weight.of_lane(me.lane, first_token(part_of) / 16 + step);
      if constexpr (kDecays) w.x *= decay, w.y *= decay, w.z *= decay, w.w *= decay;
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) {  // rows: i % 2, columns: i / 2
        const float2 v = unpack2<T>(x[part_of][4 * step + i]);
        weighted[part_of][4 * step + i] =
            pack2<T>(v.x * (i < 2 ? w.x : w.z), v.y * (i < 2 ? w.y : w.w));
      }
    }
  }
  MAMBA2_DEVICE void load_decays(OwnDecays& decays, const TokenValues& row_decay) const {
    MAMBA2_UNROLL
    for (int step = 0; step < kTokens / 16; ++step)
      decays[step] = row_decay.of_lane(me.lane, first_token(0) / 16 + step);
  }
  // That of element k of an Output.
  static MAMBA2_DEVICE float decay_of(const OwnDecays& decays, int k) {
    const float4& w = decays[k / 8];
    return k % 8 < 4 ? (k % 2 ? w.y : w.x) : (k % 2 ? w.w : w.z);
  }
  // Y = 2^a_i Y + D x
  MAMBA2_DEVICE void decay_and_skip(Output& Y, const OwnTokens& x, const OwnDecays& decays) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kTokens / 2; ++k) {
      const float2 v = unpack2<T>(x[k / 2]);
      Y[k] = fmaf(D[k / 2 % 2], k % 2 ? v.y : v.x, Y[k] * decay_of(decays, k));
    }
  }
  MAMBA2_DEVICE void gate(Output& Y, const OwnTokens& z) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kTokens / 4; ++k) {
      const float2 v = unpack2<T>(z[k]);
      Y[2 * k] *= silu(v.x), Y[2 * k + 1] *= silu(v.y);
    }
  }
  // ---- two scanners of one unit ----
  // What the own columns give to y of the other's tokens, in the order of registers.
  MAMBA2_DEVICE void send(const Output& Y) const {
    s.exchange.ring[part].wait_empty(exchanged);
    float* to = s.exchange.partial[part] + thread * 4;
    MAMBA2_UNROLL
    for (int e = 0; e < kTokens / 2; e += 4)
      *reinterpret_cast<float4*>(to + e * tile::kWarpgroup) =
          make_float4(Y[e], Y[e + 1], Y[e + 2], Y[e + 3]);
    s.exchange.ring[part].fill(exchanged);
  }
  MAMBA2_DEVICE void add_sent(Output& Y, const OwnDecays& decays) {
    const int other = 1 - part;
    s.exchange.ring[other].wait_full(exchanged);
    const float* from = s.exchange.partial[other] + thread * 4;
    MAMBA2_UNROLL
    for (int e = 0; e < kTokens / 2; e += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + e * tile::kWarpgroup);
      Y[e] = fmaf(decay_of(decays, e), v.x, Y[e]);
      Y[e + 1] = fmaf(decay_of(decays, e + 1), v.y, Y[e + 1]);
      Y[e + 2] = fmaf(decay_of(decays, e + 2), v.z, Y[e + 2]);
      Y[e + 3] = fmaf(decay_of(decays, e + 3), v.w, Y[e + 3]);
    }
    s.exchange.ring[other].release(exchanged);
    exchanged.advance();
  }

  // Y = S C^T over this scanner's columns, of its own tokens and of the others: issued, not waited
  // for. S is kept if the backward wants it.
  MAMBA2_DEVICE void read_state(Output (&Y)[kParts], const State& S, const T* C,
                                int kept_at) const {
    uint32_t S_rounded[kColumns / 4];
    tile::round_to_fragments<T>(S_rounded, S);
    if constexpr (kParts == 1) {
      if (kept_at % 2 == 0 && unit.active)
        keep_state<T, kN>(static_cast<T*>(args.kept_states) +
                              (int64_t(kept_at / 2) * args.units + unit.index) * (kP * kN),
                          S_rounded, me);
    }
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int i = 0; i < kParts; ++i)
      tile::product_rs<T, kTokens, kColumns / 16>(
          Y[i], S_rounded, tile::KMajor<kQ>{C + part * kColumns * kQ + first_token(i) * 64}, false);
    ptx::wgmma_commit_group();
  }
  // S + (weighted x) B^T: issued, not waited for.
  MAMBA2_DEVICE void add_inputs(State& S, const Tokens& weighted, const StageOf<I>& stage) const {
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int i = 0; i < kParts; ++i)
      tile::product_rs<T, kColumns, kTokens / 16>(
          S, weighted[i], tile::MnMajor<kQ>{stage.B + part * kColumns * kQ + first_token(i) * 64},
          true);
    ptx::wgmma_commit_group();
  }
  // Y + (weights) x of the own tokens: issued, not waited for.
  MAMBA2_DEVICE void add_within(Output& Y, const Tokens& x, const T* scores) const {
    ptx::wgmma_fence_operand(Y);
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int i = 0; i < kParts; ++i)
      tile::product_rs<T, kTokens, kTokens / 16>(
          Y, x[i], tile::KMajor<kTokens>{scores + first_token(0) * kQ + first_token(i)}, true);
    ptx::wgmma_commit_group();
  }
  // The state after the chunk, and y of the own tokens in Y[0]; Y = S C^T is on its way.
  MAMBA2_DEVICE void add_chunk(State& S, Output (&Y)[kParts], const Tokens& x,
                               const StageOf<I>& stage, const tile::RingPosition<kBuffers>& from,
                               OwnDecays& decays) {
    const auto& weights = s.weights[from.stage];
    const float chunk_decay = weights.row_decay[half].last();
    Tokens x_weighted;
    MAMBA2_UNROLL
    for (int e = 0; e < kColumns / 2; ++e) S[e] *= chunk_decay;
    ptx::wgmma_fence_operand(S);  // under the product
    if constexpr (kParts > 1) weigh_inputs<false>(x_weighted, x, weights.input_weight[half]);
    ptx::wgmma_wait_group<0>();
    MAMBA2_UNROLL
    for (int i = 0; i < kParts; ++i) ptx::wgmma_fence_operand(Y[i]);
    if constexpr (kParts == 1) weigh_inputs<false>(x_weighted, x, weights.input_weight[half]);
    add_inputs(S, x_weighted, stage);
    if constexpr (kParts > 1) send(Y[1]);
    load_decays(decays, weights.row_decay[half]);
    decay_and_skip(Y[0], x[0], decays);
    if constexpr (kParts > 1) s.weights_ring.wait_full(from);  // the scorer's part comes last
    add_within(Y[0], x, weights.scores[half]);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(S);
    ptx::wgmma_fence_operand(Y[0]);
  }
  // What is left to do for y.
  MAMBA2_DEVICE void keep(Before& before, Output& Y, const OwnDecays& decays,
                          const StageOf<I>& stage) const {
    OwnTokens z;
    if constexpr (kGate)
      tile::load_transposed<kTokens / 16>(z, stage.z[half] + first_token(0) * kP, me);
    if constexpr (kParts == 1) {
      if constexpr (kGate) gate(Y, z);
      tile::round_to_fragments<T>(before.y, Y);
    } else {
      MAMBA2_UNROLL
      for (int e = 0; e < kTokens / 2; ++e) before.y[e] = Y[e];
      MAMBA2_UNROLL
      for (int i = 0; i < kTokens / 16; ++i) before.decays[i] = decays[i];
      MAMBA2_UNROLL
      for (int k = 0; kGate && k < kTokens / 4; ++k) before.z[k] = z[k];
    }
  }
  // That, and y to the storer.
  MAMBA2_DEVICE void hand_over(Before& before, tile::RingPosition<kBuffers>& to) {
    OwnTokens rounded;
    if constexpr (kParts > 1) {
      add_sent(before.y, before.decays);
      if constexpr (kGate) gate(before.y, before.z);
      tile::round_to_fragments<T>(rounded, before.y);
    }
    s.y_ring[half].wait_empty(to);
    T* tile = s.y[to.stage][half] + first_token(0) * kP;
    if constexpr (kParts == 1)
      tile::store_fragments_transposed<kTokens / 16>(tile, before.y, me);
    else
      tile::store_fragments_transposed<kTokens / 16>(tile, rounded, me);
    ptx::fence_proxy_async_shared();
    s.y_ring[half].fill(to);
    to.advance();
  }

  // x of a chunk, weighed by what is left of it at the run's end.
  MAMBA2_DEVICE void weigh_backwards(Tokens& weighted, const T* s_x,
                                     tile::RingPosition<kBuffers>& from, float& through_log2) {
    const auto& weights = s.weights[from.stage];
    if (I::packed(args)) s.weights_ring.wait_full(from);  // the scorer has cleared x's tail
    Tokens x;
    load_tokens(x, s_x);
    s.weights_ring.wait_full(from);
    weigh_inputs<true>(weighted, x, weights.input_weight[half], ptx::ex2(through_log2));
    through_log2 += weights.a_log2[half][kQ - 1];
    s.weights_ring.release(from);
    from.advance();
  }
  // S + what a task adds whose chunks come backwards, up to its last one; returns log2 of what it
  // lets through. A chunk's product runs while the next chunk's x is weighed, where nothing has to
  // be waited for first: a stage that is kept meanwhile would itself come back later.
  MAMBA2_DEVICE float sum_up(State& S, tile::RingPosition<kStages>& at,
                             tile::RingPosition<kBuffers>& from) {
    Tokens weighted, next;
    float through_log2 = 0.f;  // from behind the chunk to the run's end
    weigh_backwards(weighted, s.stage[at.stage].x[half], from, through_log2);
    for (;;) {
      const auto now = at;
      const bool more = !(tile::uniform(s.info[now.stage].flags) & kEndsTask);
      bool held = more;
      add_inputs(S, weighted, s.stage[now.stage]);
      if (more) {
        at.advance();
        const bool waits = !s.ring.is_full(at) || !s.weights_ring.is_full(from);
        if (tile::uniform(waits)) {  // all lanes go one way
          ptx::wgmma_wait_group<0>();
          s.ring.release(now);
          held = false;
        }
        s.ring.wait_full(at);
        weigh_backwards(next, s.stage[at.stage].x[half], from, through_log2);
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(S);
      MAMBA2_UNROLL
      for (int i = 0; i < kParts; ++i) ptx::wgmma_fence_operand(weighted[i]);
      if (!more) return through_log2;
      if (held) s.ring.release(now);
      MAMBA2_UNROLL
      for (int i = 0; i < kQ / 4; ++i) (&weighted[0][0])[i] = (&next[0][0])[i];
    }
  }
  // The state that enters a run whose first stage is at hand, and before it the tasks that are only
  // sums. False: nothing follows. One copy of each step for sums and runs: what does not run still
  // lies between what does, and makes it miss the instruction cache.
  MAMBA2_DEVICE bool enter(State& S, tile::RingPosition<kStages>& at,
                           tile::RingPosition<kBuffers>& from) {
    for (;;) {
      const int flags = tile::uniform(s.info[at.stage].flags);
      if (flags & kExit) return false;
      const bool sums = (flags & kBackwards) != 0;
      if (!sums && args.schedule == Schedule::prefixes && !(flags & kBeginsSequence))
        return true;  // the sum before it is in the registers
      this->clear(S);
      const float through_log2 = sums ? sum_up(S, at, from) : 0.f;
      const StageInfo& info = s.info[at.stage];
      if (info.flags & (kBackwards | kBeginsTask)) this->begin_task(info);
      if (info.flags & kBeginsSequence)
        this->add_initial_state(S, info.i_seq, ptx::ex2(through_log2));
      else if (!(info.flags & kBackwards))
        this->load_carry(S, info);
      if (!(info.flags & kBackwards)) return true;
      this->finish_sum(S, info, through_log2);
      s.ring.release(at);
      at.advance();
      s.ring.wait_full(at);
    }
  }

  MAMBA2_DEVICE void run() {
    State S;
    Before before;
    bool y_waits = false;  // of the chunk before, to be handed over under this chunk's S C^T
    bool enters = true;    // a run or a sequence begins, or nothing follows
    int kept_at = 1;       // as StageInfo's, counted along: reading it would delay every chunk
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> from, to;
    for (;; at.advance(), from.advance(), kept_at += args.kept_states != nullptr) {
      s.ring.wait_full(at);
      if (enters) {
        if (y_waits) hand_over(before, to);
        y_waits = false;
        if (!enter(S, at, from)) return;
        kept_at = tile::uniform(s.info[at.stage].kept_at);
      }
      const auto& info = s.info[at.stage];
      const auto& stage = s.stage[at.stage];
      Output Y[kParts];
      Tokens x;
      OwnDecays decays;
      read_state(Y, S, stage.C, kept_at);
      if (y_waits) hand_over(before, to);
      if (kParts == 1 || I::packed(args))
        s.weights_ring.wait_full(from);  // the scorer has cleared x's tail
      load_tokens(x, stage.x[half]);
      if (kParts > 1) s.decays_ring.wait_full(from);
      add_chunk(S, Y, x, stage, from, decays);
      keep(before, Y[0], decays, stage);
      s.weights_ring.release(from);
      const int flags = tile::uniform(info.flags);
      enters = (flags & (kEndsTask | kEndsSequence)) != 0;
      if (enters) this->leave_run(S, info);
      s.ring.release(at);
      y_waits = true;
    }
  }
};

}  // namespace mamba2::ssd::sm90
