// A scanner's state in fused_scan (sm_90a) where runs and sequences begin and end: from and to
// global memory.
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class I>
struct StateEnds {
  using T = typename I::T;
  static constexpr int kN = I::kN, kUnits = I::kUnits, kParts = I::kParts;
  static constexpr int kColumns = kN / kParts;
  using State = float[kColumns / 2];  // (64 p, columns) of one unit, an accumulator

  const FusedScanArgs& args;
  const int half, part, thread;  // the unit's place in the block, the scanner's in the unit
  const tile::Lane me;
  Unit unit{};
  float D[2] = {0.f, 0.f};

  MAMBA2_DEVICE StateEnds(const FusedScanArgs& args, int scanner, int thread)
      : args(args), half(scanner / kParts), part(scanner % kParts), thread(thread), me(thread) {}

  MAMBA2_DEVICE void sync() const {
    ptx::bar_sync(kFirstScanner + half * kParts + part, tile::kWarpgroup);
  }

  // Whether a row of the state is a channel, and not what pads p to 64.
  MAMBA2_DEVICE bool exists(int r) const { return unit.p_block * kP + me.row(r) < args.p; }
  // The channel of a row. Padding reads what the last channel has: nothing of it is ever stored,
  // and a load that is always made needs no register for whether it was.
  MAMBA2_DEVICE int channel(int r) const {
    const int p = unit.p_block * kP + me.row(r);
    return !I::kPlain && p >= args.p ? args.p - 1 : p;
  }
  // Whether the columns of elements e and e + 1 are the tensors', and not what pads n to 64.
  MAMBA2_DEVICE bool has_columns(int e) const {
    return I::kPlain || kN > 64 || me.column(e / 4) < args.n;
  }
  MAMBA2_DEVICE int64_t state_offset(int i_seq, int e) const {  // into (nseq, h, p, n)
    const int p = channel((e >> 1) & 1), n = part * kColumns + me.column(e / 4);
    return ((int64_t(i_seq) * args.h + unit.head) * args.p + p) * args.n + n;
  }
  MAMBA2_DEVICE float* carry(
      int slot) const {  // (n / 8, 128 threads, 4): in the order of registers
    return args.carry + ((int64_t(slot) * args.units + unit.index) * kP * kN) +
           part * kColumns * kP + thread * 4;
  }
  MAMBA2_DEVICE int* flag_of(int slot) const {
    return args.flags + (slot * kParts + part) * args.units + unit.index;
  }
  static MAMBA2_DEVICE void clear(State& S) {
    MAMBA2_UNROLL
    for (int e = 0; e < kColumns / 2; ++e) S[e] = 0.f;
  }
  // S + decay (what the sequence starts from), two columns at a time.
  static MAMBA2_DEVICE float2 pair_at(const float* from) {
    return *reinterpret_cast<const float2*>(from);
  }
  static MAMBA2_DEVICE float2 pair_at(const T* from) {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
  }
  template <class Element>
  MAMBA2_DEVICE void add_initial_state(State& S, int i_seq, float decay) const {
    const auto* states = static_cast<const Element*>(args.initial_states.ptr);
    MAMBA2_UNROLL
    for (int e = 0; e < kColumns / 2; e += 2) {
      if (!has_columns(e)) continue;  // they stay zero, as those of B and C
      const float2 v = pair_at(states + state_offset(i_seq, e));
      S[e] = fmaf(decay, v.x, S[e]), S[e + 1] = fmaf(decay, v.y, S[e + 1]);
    }
  }
  MAMBA2_DEVICE void add_initial_state(State& S, int i_seq, float decay) const {
    if (!args.initial_states || !unit.active) return;
    if (I::parameter(args.initial_states).dtype == DType::f32)
      add_initial_state<float>(S, i_seq, decay);
    else
      add_initial_state<T>(S, i_seq, decay);
  }
  MAMBA2_DEVICE void finish_sequence(const State& S, int i_seq) const {
    MAMBA2_UNROLL
    for (int e = 0; e < kColumns / 2; e += 2)
      if (I::kPlain || (exists((e >> 1) & 1) && has_columns(e)))
        *reinterpret_cast<float2*>(args.final_states + state_offset(i_seq, e)) =
            make_float2(S[e], S[e + 1]);
  }
  // S = the carry of a slot, or with what came before it: 2^through S + carry.
  MAMBA2_DEVICE void add_carry(State& S, int slot, bool alone) const {
    const float* from = carry(slot);
    const bool first = alone || slot == 0;
    const float through =
        first ? 0.f : ptx::ex2(args.through_log2[int64_t(slot) * args.units + unit.index]);
    MAMBA2_UNROLL
    for (int i = 0; i < kColumns / 8; ++i) {
      const float4 v = ptx::ld_cg_v4(from + i * tile::kWarpgroup * 4);
      float* at = S + 4 * i;
      at[0] = first ? v.x : fmaf(through, at[0], v.x),
      at[1] = first ? v.y : fmaf(through, at[1], v.y);
      at[2] = first ? v.z : fmaf(through, at[2], v.z),
      at[3] = first ? v.w : fmaf(through, at[3], v.w);
    }
  }
  MAMBA2_DEVICE void load_carry(State& S, const StageInfo& info) const {
    if (!unit.active) return;
    if (args.schedule == Schedule::tickets) {
      const int* flag = flag_of(info.slot);
      while (ptx::ld_acquire_gpu(flag) < info.segment) ptx::nanosleep(64);
    }
    const bool is_sum = args.schedule == Schedule::tickets || args.carry_is_sum;
    MAMBA2_NO_UNROLL
    for (int k = is_sum ? info.slot : 0; k < info.slot + is_sum; ++k) add_carry(S, k, is_sum);
  }
  MAMBA2_DEVICE void store_carry(const State& S, const StageInfo& info) const {
    float* to = carry(info.slot);
    MAMBA2_UNROLL
    for (int i = 0; i < kColumns / 8; ++i)
      *reinterpret_cast<float4*>(to + i * tile::kWarpgroup * 4) =
          make_float4(S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]);
    if (args.schedule == Schedule::tickets) {
      sync();
      if (thread == 0) ptx::st_release_gpu(flag_of(info.slot), info.segment + 1);
    }
  }
  MAMBA2_DEVICE void begin_task(const StageInfo& info) {
    unit = unit_of<kUnits>(args, info.pair, half);
    if (!args.D || !unit.active) return;
    const AnyFloat values = I::parameter(args.D);
    const int first = args.D_per_channel ? unit.head * args.p + channel(0) : unit.head;
    const int second = args.D_per_channel ? unit.head * args.p + channel(1) : unit.head;
    D[0] = mamba2::load<float>(values, first), D[1] = mamba2::load<float>(values, second);
  }
  MAMBA2_DEVICE void leave_run(const State& S, const StageInfo& info) {
    unit = unit_of<kUnits>(args, info.pair, half);  // again: no register holds it meanwhile
    if (!unit.active) return;
    if (info.flags & kEndsSequence) {
      if (args.final_states) finish_sequence(S, info.i_seq);
    } else if (args.schedule == Schedule::tickets) {
      store_carry(S, info);
    }
  }
  // What a run adds is complete, and also how much it lets through. ssd_segment_state: it was a
  // whole sequence.
  MAMBA2_DEVICE void finish_sum(const State& S, const StageInfo& info, float through_log2) const {
    if (!unit.active || args.schedule == Schedule::prefixes) return;  // its run takes S
    if (!I::kPlain && args.final_states) return finish_sequence(S, info.i_seq);
    store_carry(S, info);
    if (thread == 0 && part == 0)
      args.through_log2[int64_t(info.slot) * args.units + unit.index] =
          info.flags & kBeginsSequence ? -1e30f : through_log2;
  }
};

}  // namespace mamba2::ssd::sm90
