// A scanner warpgroup of fused_scan (sm_90a): one unit's chunks in order, its state in registers.
// With n = 256 two scanners share a unit: each has half the columns of the state and finishes y of
// half the tokens; what its columns give to y of the other tokens goes to the other scanner.
#pragma once
#include "formulas.cuh"
#include "fused_scan_ends_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, int kStages, bool kPadded>
struct Scanner : StateEnds<kN, kPadded> {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  using Ends = StateEnds<kN, kPadded>;
  using Ends::args, Ends::unit, Ends::half, Ends::part, Ends::thread, Ends::me, Ends::D;
  using Ends::kUnits, Ends::kParts, Ends::kColumns;
  using typename Ends::State;
  static constexpr int kTokens = kQ / kParts;
  using Product = float[kQ / 2];      // (64 p, 64 tokens)
  using Output = float[kTokens / 2];  // (64 p, own tokens)
  using Tokens = uint32_t[kQ / 4];    // x of the chunk, transposed: A fragments (p, tokens)
  using OwnTokens = uint32_t[kTokens / 4];

  Smem& s;
  tile::RingPosition<1> exchanged{};

  MAMBA2_DEVICE Scanner(const FusedScanArgs& args, Smem& s, int scanner, int thread)
      : Ends(args, scanner, thread), s(s) {}

  // ---- the steps of a chunk ----
  // w_j x_j, rounded: the A fragments of what enters the state. decay: what is left of it later.
  template <bool kDecays>
  MAMBA2_DEVICE void weigh_inputs(Tokens& weighted, const Tokens& x,
                                  const TokenValues& input_weight, float decay = 1.f) const {
    MAMBA2_UNROLL
    for (int step = 0; step < kQ / 16; ++step) {
      float4 w = input_weight.of_lane(me.lane, step);
      if constexpr (kDecays) w.x *= decay, w.y *= decay, w.z *= decay, w.w *= decay;
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) {  // rows: i % 2, columns: i / 2
        const float2 v = unpack2<T>(x[4 * step + i]);
        weighted[4 * step + i] = pack2<T>(v.x * (i < 2 ? w.x : w.z), v.y * (i < 2 ? w.y : w.w));
      }
    }
  }
  // Y = 2^a_i Y + D x
  MAMBA2_DEVICE void decay_and_skip(Output& Y, const OwnTokens& x,
                                    const TokenValues& row_decay) const {
    MAMBA2_UNROLL
    for (int step = 0; step < kTokens / 16; ++step) {
      const float4 w = row_decay.of_lane(me.lane, part * (kTokens / 16) + step);
      MAMBA2_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = 4 * step + i;
        const float2 v = unpack2<T>(x[k]);
        Y[2 * k] = fmaf(D[i % 2], v.x, Y[2 * k] * (i < 2 ? w.x : w.z));
        Y[2 * k + 1] = fmaf(D[i % 2], v.y, Y[2 * k + 1] * (i < 2 ? w.y : w.w));
      }
    }
  }
  MAMBA2_DEVICE void gate(Output& Y, const T* s_z) const {
    OwnTokens z;
    tile::load_transposed<kTokens / 16>(z, s_z + part * kTokens * kP, me);
    MAMBA2_UNROLL
    for (int k = 0; k < kTokens / 4; ++k) {
      const float2 v = unpack2<T>(z[k]);
      Y[2 * k] *= silu(v.x), Y[2 * k + 1] *= silu(v.y);
    }
  }
  // ---- two scanners of one unit ----
  // Of what all tokens have: the own ones, to the front.
  template <class Value, int kAll>
  MAMBA2_DEVICE void keep_own(Value (&all)[kAll]) const {
    MAMBA2_UNROLL
    for (int i = 0; i < kAll / 2; ++i) all[i] = part ? all[kAll / 2 + i] : all[i];
  }
  // The other scanner's tokens of S C^T to it, in the order of registers.
  MAMBA2_DEVICE void send(const Product& SC) const {
    s.exchange.ring[part].wait_empty(exchanged);
    float* to = s.exchange.partial[part] + thread * 4;
    MAMBA2_UNROLL
    for (int e = 0; e < kTokens / 2; e += 4)
      *reinterpret_cast<float4*>(to + e * tile::kWarpgroup) =
          part ? make_float4(SC[e], SC[e + 1], SC[e + 2], SC[e + 3])
               : make_float4(SC[kTokens / 2 + e], SC[kTokens / 2 + e + 1], SC[kTokens / 2 + e + 2],
                             SC[kTokens / 2 + e + 3]);
    s.exchange.ring[part].fill(exchanged);
  }
  MAMBA2_DEVICE void receive(Output& sent) {
    const int other = 1 - part;
    s.exchange.ring[other].wait_full(exchanged);
    const float* from = s.exchange.partial[other] + thread * 4;
    MAMBA2_UNROLL
    for (int e = 0; e < kTokens / 2; e += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + e * tile::kWarpgroup);
      sent[e] = v.x, sent[e + 1] = v.y, sent[e + 2] = v.z, sent[e + 3] = v.w;
    }
    s.exchange.ring[other].release(exchanged);
    exchanged.advance();
  }
  MAMBA2_DEVICE void add_decayed(Output& Y, const Output& sent,
                                 const TokenValues& row_decay) const {
    MAMBA2_UNROLL
    for (int e = 0; e < kTokens / 2; e += 8) {
      const float4 w = row_decay.of_lane(me.lane, part * (kTokens / 16) + e / 8);
      MAMBA2_UNROLL
      for (int i = e; i < e + 8; i += 2) {
        Y[i] = fmaf(i % 8 < 4 ? w.x : w.z, sent[i], Y[i]);
        Y[i + 1] = fmaf(i % 8 < 4 ? w.y : w.w, sent[i + 1], Y[i + 1]);
      }
    }
  }

  // Y = S C^T over this scanner's columns: issued, not waited for. S is kept if the backward wants
  // it.
  MAMBA2_DEVICE void read_state(Product& Y, const State& S, const T* C, int kept_at) const {
    uint32_t S_rounded[kColumns / 4];
    tile::round_to_fragments<T>(S_rounded, S);
    if constexpr (kParts == 1) {
      if (kept_at % 2 == 0 && unit.active)
        keep_state<T, kN>(static_cast<T*>(args.kept_states) +
                              (int64_t(kept_at / 2) * args.units + unit.index) * (kP * kN),
                          S_rounded, me);
    }
    ptx::wgmma_fence();
    tile::product_rs<T, kQ, kColumns / 16>(Y, S_rounded, tile::KMajor<kQ>{C + part * kColumns * kQ},
                                           false);
    ptx::wgmma_commit_group();
  }
  // S + (weighted x) B^T: issued, not waited for.
  MAMBA2_DEVICE void add_inputs(State& S, const Tokens& weighted,
                                const Stage<T, kN, kGate>& stage) const {
    ptx::wgmma_fence();
    tile::product_rs<T, kColumns, kQ / 16>(S, weighted,
                                           tile::MnMajor<kQ>{stage.B + part * kColumns * kQ}, true);
    ptx::wgmma_commit_group();
  }
  // The state after the chunk, and y of its own tokens in front of Y; Y = S C^T is on its way.
  MAMBA2_DEVICE void add_chunk(State& S, Product& Y, const Stage<T, kN, kGate>& stage,
                               const Weights<T, kUnits>& weights) {
    const float chunk_decay = weights.row_decay[half].last();
    Tokens x, x_weighted;
    tile::load_transposed<kQ / 16>(x, stage.x[half], me);
    MAMBA2_UNROLL
    for (int e = 0; e < kColumns / 2; ++e) S[e] *= chunk_decay;
    ptx::wgmma_fence_operand(S);  // under the product
    if constexpr (kParts > 1) weigh_inputs<false>(x_weighted, x, weights.input_weight[half]);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(Y);
    if constexpr (kParts == 1) weigh_inputs<false>(x_weighted, x, weights.input_weight[half]);
    add_inputs(S, x_weighted, stage);
    auto& own_Y = tile::front<kTokens / 2>(Y);
    Output sent;
    if constexpr (kParts > 1) {
      send(Y);
      keep_own(Y);
      OwnTokens own_x;
      tile::load_transposed<kTokens / 16>(own_x, stage.x[half] + part * kTokens * kP, me);
      decay_and_skip(own_Y, own_x, weights.row_decay[half]);
      tile::load_transposed<kQ / 16>(x, stage.x[half], me);  // again: registers are scarce above
    } else {
      decay_and_skip(own_Y, x, weights.row_decay[half]);
    }
    ptx::wgmma_fence_operand(own_Y);
    ptx::wgmma_fence();
    const T* scores = weights.scores[half] + part * kTokens * kQ;
    tile::product_rs<T, kTokens, kQ / 16>(own_Y, x, tile::KMajor<kTokens>{scores}, true);
    ptx::wgmma_commit_group();
    if constexpr (kParts > 1) receive(sent);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(S);
    ptx::wgmma_fence_operand(own_Y);
    if constexpr (kParts > 1) add_decayed(own_Y, sent, weights.row_decay[half]);
  }
  // y to the storer.
  MAMBA2_DEVICE void hand_over(const OwnTokens& y, tile::RingPosition<kBuffers>& to) const {
    s.y_ring[half].wait_empty(to);
    T* tile = s.y[to.stage][half] + part * kTokens * kP;
    tile::store_fragments_transposed<kTokens / 16>(tile, y, me);
    ptx::fence_proxy_async_shared();
    s.y_ring[half].fill(to);
    to.advance();
  }

  // x of a chunk, weighed by what is left of it at the run's end.
  MAMBA2_DEVICE void weigh_backwards(Tokens& weighted, const T* s_x,
                                     tile::RingPosition<kBuffers>& from, float& through_log2) {
    const auto& weights = s.weights[from.stage];
    if (args.chunking.table) s.weights_ring.wait_full(from);  // the scorer has cleared x's tail
    Tokens x;
    tile::load_transposed<kQ / 16>(x, s_x, me);
    s.weights_ring.wait_full(from);
    weigh_inputs<true>(weighted, x, weights.input_weight[half], ptx::ex2(through_log2));
    through_log2 += weights.a_log2[half][kQ - 1];
    s.weights_ring.release(from);
    from.advance();
  }
  // What the tasks add whose chunks come backwards, up to a stage of another: a chunk's product
  // runs while the next chunk's x is weighed. It is waited for in the same turn of the loop: only
  // so far does the assembler keep the registers that it reads.
  MAMBA2_DEVICE void sum_up(State& S, tile::RingPosition<kStages>& at,
                            tile::RingPosition<kBuffers>& from) {
    Tokens weighted, next;
    while (tile::uniform(s.info[at.stage].flags) & kBackwards) {
      this->begin_task(s.info[at.stage]);
      this->clear(S);
      float through_log2 = 0.f;  // from behind the chunk to the run's end
      weigh_backwards(weighted, s.stage[at.stage].x[half], from, through_log2);
      for (;;) {
        const auto now = at;
        const bool more = !(tile::uniform(s.info[now.stage].flags) & kEndsTask);
        add_inputs(S, weighted, s.stage[now.stage]);
        if (more) {
          at.advance();
          s.ring.wait_full(at);
          weigh_backwards(next, s.stage[at.stage].x[half], from, through_log2);
        }
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_fence_operand(S);
        if (!more) break;
        s.ring.release(now);
        MAMBA2_UNROLL
        for (int i = 0; i < kQ / 4; ++i) weighted[i] = next[i];
      }
      this->finish_sum(S, s.info[at.stage], through_log2);
      s.ring.release(at);
      at.advance();
      s.ring.wait_full(at);
    }
  }

  MAMBA2_DEVICE void run() {
    State S;
    OwnTokens y;           // of the chunk before, rounded
    bool y_waits = false;  // to be handed over, under this chunk's S C^T
    bool enters = true;    // a run or a sequence begins, or nothing follows
    int kept_at = 1;       // as StageInfo's, counted along: reading it would delay every chunk
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> from, to;
    for (;; at.advance(), from.advance(), kept_at += args.kept_states != nullptr) {
      s.ring.wait_full(at);
      if (enters) {
        if (y_waits) hand_over(y, to);
        y_waits = false;
        sum_up(S, at, from);
      }
      const auto& info = s.info[at.stage];
      const auto& stage = s.stage[at.stage];
      const auto& weights = s.weights[from.stage];
      if (enters) {
        if (tile::uniform(info.flags) & kExit) return;
        this->enter_run(S, info);
        kept_at = tile::uniform(info.kept_at);
      }
      Product Y;
      read_state(Y, S, stage.C, kept_at);
      if (y_waits) hand_over(y, to);
      s.weights_ring.wait_full(from);
      add_chunk(S, Y, stage, weights);
      if constexpr (kGate) gate(tile::front<kTokens / 2>(Y), stage.z[half]);
      s.weights_ring.release(from);
      const int flags = tile::uniform(info.flags);
      enters = (flags & (kEndsTask | kEndsSequence)) != 0;
      if (enters) this->leave_run(S, info);
      s.ring.release(at);
      tile::round_to_fragments<T>(y, tile::front<kTokens / 2>(Y));
      y_waits = true;
    }
  }
};

}  // namespace mamba2::ssd::sm90
