// The consumer warpgroup of fused_scan (sm_90a): one unit's chunks in order, its state in registers.
#pragma once
#include "formulas.cuh"
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

// Barriers: 0 is __syncthreads; 1 both consumers; 2, 3 one consumer each.
constexpr int kBarrierConsumers = 1, kBarrierConsumer = 2;

template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Consumer {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  using State = float[kN / 2];   // (64 p, n) of one unit, an accumulator
  using Output = float[kQ / 2];  // (64 p, 64 tokens) or (64 i, 64 j)

  const FusedScanArgs& args;
  Smem& s;
  const int half, thread;
  const tile::Lane me;
  Unit unit{};
  float D[2] = {0.f, 0.f};

  MAMBA2_DEVICE Consumer(const FusedScanArgs& args, Smem& s, int half, int thread)
      : args(args), s(s), half(half), thread(thread), me(thread) {}

  MAMBA2_DEVICE void sync() const { ptx::bar_sync(kBarrierConsumer + half, tile::kWarpgroup); }

  // ---- the state at the ends of a run ----
  MAMBA2_DEVICE int64_t state_offset(int i_seq, int e) const {  // into (nseq, h, p, n)
    const int p = unit.p_block * kP + me.row((e >> 1) & 1), n = me.column(e / 4);
    return ((int64_t(i_seq) * args.h + unit.head) * args.p + p) * args.n + n;
  }
  MAMBA2_DEVICE float* carry(int slot) const {  // (n / 8, 128 threads, 4): in the order of registers
    return args.carry + ((int64_t(slot) * args.units() + unit.index) * kP * kN) + thread * 4;
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
      const int* flag = args.flags + info.slot * args.units() + unit.index;
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
        ptx::st_release_gpu(args.flags + info.slot * args.units() + unit.index, info.segment + 1);
    }
  }
  MAMBA2_DEVICE void enter_chunk(State& S, const StageInfo& info, float& through_log2) {
    if (info.begins_task) begin_task(info), through_log2 = 0.f;
    if (info.chunk.i_c == 0) {
      start_sequence(S, info.chunk.i_seq);
      through_log2 = -1e30f;
    } else if (info.begins_task) {
      load_carry(S, info);
    }
  }
  MAMBA2_DEVICE void leave_chunk(const State& S, const StageInfo& info, float through_log2) const {
    if (!unit.active) return;
    if constexpr (kStateOnly) {
      if (!info.ends_task) return;
      store_carry(S, info);
      if (thread == 0)
        args.through_log2[int64_t(info.slot) * args.units() + unit.index] = through_log2;
    } else if (info.chunk.is_last) {
      if (args.final_states) finish_sequence(S, info.chunk.i_seq);
    } else if (info.ends_task && args.schedule == Schedule::tickets) {
      store_carry(S, info);
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

  // ---- the steps of a chunk ----
  // Rows behind a packed sequence's end are the next sequence's: its NaN times 0 would be NaN.
  MAMBA2_DEVICE void clear_tail(Stage<T, kN, kGate>& stage, int count) const {
    const int all = half * tile::kWarpgroup + thread;
    MAMBA2_UNROLL
    for (int panel = 0; panel < kN / 64; ++panel)
      tile::zero_rows<kQ>(stage.B + panel * kQ * 64, count, all, 2 * tile::kWarpgroup);
    tile::zero_rows<kQ>(stage.x[half], count, thread, tile::kWarpgroup);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kBarrierConsumers, 2 * tile::kWarpgroup);
  }
  // 2^a_i for the rows of S C^T, 2^(a_q - a_j) delta_j for what enters the state.
  MAMBA2_DEVICE void decay_factors(const Stage<T, kN, kGate>& stage) const {
    const int t = thread % kQ;
    const bool is_row = thread < kQ;  // selects, not branches: products are in flight
    const float a = stage.a_log2[half][t], a_q = stage.a_log2[half][kQ - 1];
    const float delta = stage.delta[half][t];
    const float value = ptx::ex2(is_row ? a : a_q - a) * (is_row ? 1.f : delta);
    *(is_row ? &s.row_decay[half][t] : &s.input_weight[half][t]) = value;
  }
  // C B^T o L o delta, rounded, to shared memory [i][j]; blocks above the diagonal stay zero.
  MAMBA2_DEVICE void weigh(const Output& scores, const Stage<T, kN, kGate>& stage) const {
    const float* a = stage.a_log2[half];
    const float* delta = stage.delta[half];
    const float a_i[2] = {a[me.row(0)], a[me.row(1)]};
    MAMBA2_UNROLL
    for (int t = 0; t < kQ / 16; ++t) {
      if (t > me.warp) continue;
      uint32_t r[4];
      MAMBA2_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int j = me.column(2 * t + u);
        const float2 a_j = *reinterpret_cast<const float2*>(a + j);
        const float2 d_j = *reinterpret_cast<const float2*>(delta + j);
        MAMBA2_UNROLL
        for (int v = 0; v < 2; ++v) {
          const int i = me.row(v), e = 8 * t + 4 * u + 2 * v;
          const float lo = i >= j ? scores[e] * ptx::ex2(a_i[v] - a_j.x) * d_j.x : 0.f;
          const float hi = i >= j + 1 ? scores[e + 1] * ptx::ex2(a_i[v] - a_j.y) * d_j.y : 0.f;
          r[2 * u + v] = pack2<T>(lo, hi);
        }
      }
      tile::store_fragment(s.weights[half], r, t, me);
    }
  }
  MAMBA2_DEVICE void scale_tokens(Output& Y) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 w = *reinterpret_cast<const float2*>(s.row_decay[half] + me.column(k));
      Y[4 * k] *= w.x, Y[4 * k + 1] *= w.y, Y[4 * k + 2] *= w.x, Y[4 * k + 3] *= w.y;
    }
  }
  // x_j 2^(a_q - a_j) delta_j, rounded: the A fragments of what enters the state.
  MAMBA2_DEVICE void weigh_inputs(uint32_t (&weighted)[16], const uint32_t (&x)[16]) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 8; ++k) {
      const float2 w = *reinterpret_cast<const float2*>(s.input_weight[half] + me.column(k));
      MAMBA2_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float2 v = unpack2<T>(x[2 * k + r]);
        weighted[2 * k + r] = pack2<T>(v.x * w.x, v.y * w.y);
      }
    }
  }
  MAMBA2_DEVICE void skip_and_gate(Output& Y, const uint32_t (&x)[16],
                                   const Stage<T, kN, kGate>& stage) const {
    MAMBA2_UNROLL
    for (int k = 0; k < kQ / 4; ++k) {
      const float2 v = unpack2<T>(x[k]);
      Y[2 * k] += D[k & 1] * v.x, Y[2 * k + 1] += D[k & 1] * v.y;
    }
    if constexpr (kGate) {
      uint32_t z[16];
      tile::load_transposed<4>(z, stage.z[half], me);
      MAMBA2_UNROLL
      for (int k = 0; k < kQ / 4; ++k) {
        const float2 v = unpack2<T>(z[k]);
        Y[2 * k] *= silu(v.x), Y[2 * k + 1] *= silu(v.y);
      }
    }
  }
  // y of the chunk to global memory: one bulk store, or row by row where a neighbour follows.
  MAMBA2_DEVICE void store_y(const Output& Y, const Chunk& c) const {
    tile::store_transposed<T, kQ>(s.y[half], Y, me);
    ptx::fence_proxy_async_shared();
    sync();
    if (!args.chunking.table || c.count == kQ) {
      if (thread == 0 && unit.active) {
        ptx::tma_store_4d(&args.y, unit.p_block * kP, unit.head, c.token, c.row, s.y[half]);
        ptx::bulk_commit_group();
      }
      return;
    }
    T* y = static_cast<T*>(args.y_out.ptr) + c.token * args.y_out.l + unit.head * args.y_out.h +
           unit.p_block * kP;
    for (int i = thread; i < (unit.active ? c.count * 8 : 0); i += tile::kWarpgroup)
      *reinterpret_cast<uint4*>(y + i / 8 * args.y_out.l + i % 8 * 8) =
          *static_cast<const uint4*>(tile::panel_address(s.y[half], i / 8, i % 8 * 8));
  }

  // One chunk: y and the state after it. (Steps of the two products overlap where they can.)
  MAMBA2_DEVICE void chunk(State& S, Stage<T, kN, kGate>& stage, const Chunk& c) const {
    const tile::KMajor<kQ> B{stage.B}, C{stage.C}, weights{s.weights[half]};
    uint32_t x[16];
    Output Y;
    if constexpr (!kStateOnly) {
      Output scores;
      uint32_t S_rounded[kN / 4];
      tile::round_to_fragments<T>(S_rounded, S);
      ptx::wgmma_fence();
      tile::product_ss<T, kQ, kN / 16>(scores, C, B, false);
      ptx::wgmma_commit_group();
      tile::product_rs<T, kQ, kN / 16>(Y, S_rounded, C, false);
      ptx::wgmma_commit_group();
      decay_factors(stage);
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(scores);
      weigh(scores, stage);
      if (thread == 0) ptx::bulk_wait_group_read<0>();  // the last chunk's y has left its buffer
      ptx::fence_proxy_async_shared();
      sync();
      tile::load_transposed<4>(x, stage.x[half], me);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(Y);
      scale_tokens(Y);
      ptx::wgmma_fence_operand(Y);
      ptx::wgmma_fence();
      tile::product_rs<T, kQ, kQ / 16>(Y, x, weights, true);
      ptx::wgmma_commit_group();
    } else {
      decay_factors(stage);
      sync();
      tile::load_transposed<4>(x, stage.x[half], me);
    }
    uint32_t x_weighted[16];
    weigh_inputs(x_weighted, x);
    const float chunk_decay = ptx::ex2(stage.a_log2[half][kQ - 1]);
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) S[e] *= chunk_decay;
    ptx::wgmma_fence_operand(S);
    ptx::wgmma_fence();
    tile::product_rs<T, kN, kQ / 16>(S, x_weighted, tile::MnMajor<kQ>{stage.B}, true);
    ptx::wgmma_commit_group();
    if constexpr (!kStateOnly) {
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_fence_operand(Y);
      skip_and_gate(Y, x, stage);
      store_y(Y, c);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(S);
    if constexpr (kStateOnly) sync();  // the factors are free for the next chunk
  }

  MAMBA2_DEVICE void run() {
    State S;
    float through_log2 = 0.f;  // of the run, pass one
    tile::RingPosition<kStages> at;
    for (;; at.advance()) {
      ptx::mbarrier_wait(&s.ring.full[at.stage], at.phase);
      const StageInfo info = s.info[at.stage];
      if (info.exit) break;
      auto& stage = s.stage[at.stage];
      if (args.chunking.table && info.chunk.count < kQ) clear_tail(stage, info.chunk.count);
      enter_chunk(S, info, through_log2);
      if constexpr (kStateOnly) through_log2 += stage.a_log2[half][kQ - 1];
      chunk(S, stage, info.chunk);
      leave_chunk(S, info, through_log2);
      ptx::mbarrier_arrive(&s.ring.empty[at.stage]);
    }
    if (!kStateOnly && thread == 0) ptx::bulk_wait_group<0>();
  }
};

template <class T, int kN, bool kGate, bool kStateOnly>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    fused_scan_kernel(const MAMBA2_GRID_CONSTANT FusedScanArgs args) {
#if MAMBA2_SM90A
  constexpr int kStages = fused_scan_stages<T, kN, kGate>();
  auto& s = *static_cast<FusedScanSmem<T, kN, kGate, kStages>*>(ptx::dynamic_smem());
  const int warpgroup = threadIdx.x / tile::kWarpgroup;
  if (threadIdx.x == 0) {
    s.ring.init(kConsumers * tile::kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  for (int half = 0; half < kConsumers; ++half)
    tile::zero_rows<kQ>(s.weights[half], 0, threadIdx.x, kThreads);
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) {
      Producer<T, kN, kGate, kStages, kStateOnly> producer{args, s, {}};
      producer.run();
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    Consumer<T, kN, kGate, kStages, kStateOnly> consumer(args, s, warpgroup - 1,
                                                         threadIdx.x % tile::kWarpgroup);
    consumer.run();
  }
#endif
}

}  // namespace mamba2::ssd::sm90
