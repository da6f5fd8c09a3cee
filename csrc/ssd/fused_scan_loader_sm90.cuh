// The loader of fused_scan (sm_90a).
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
        s.info[at.stage] = {flags,   c.row,     c.token,   c.count,
                            c.i_seq, task.pair, task.slot, task.segment};
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

}  // namespace mamba2::ssd::sm90
