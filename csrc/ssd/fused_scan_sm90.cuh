// fused_scan (sm_90a): chunk_state, state_passing and chunk_scan in one kernel.
//
//   y_i = 2^a_i S C_i + sum_{j <= i} 2^(a_i - a_j) delta_j (C_i . B_j) x_j + D x_i     (times silu(z_i))
//   S   = 2^a_q S + sum_j 2^(a_q - a_j) delta_j x_j B_j^T                     chunk by chunk, q = 64
//
// A unit is one head's block of 64 channels; a block of threads takes pairs of units of one group,
// which share the tiles of B and C: one producer warp (TMA) and two consumer warpgroups, one unit
// each. The state S (64 p, n) stays in fp32 accumulators; rounded, it is at once the A operand of
// S C^T, so nothing on the serial chain passes through shared memory. All products are transposed,
// (p, tokens), so that x is an A operand of both sums and D x and the gate are thread-local.
//
// Work: tasks (pair, run of chunks), persistent blocks.
//   kTickets: runs follow one another through a fp32 carry in global memory, in ticket order (a task
//             waits only for one with a smaller ticket): exact, any cut gives the same bits.
//   kSegments: runs start from known states: pass one (kStateOnly) computes what each run adds,
//             segment_scan adds them up, pass two runs all of them at once.
// Shared memory: kStages x (B, C: 64 n each; x: 2 tiles of 64 x 64; z likewise) + weights and y
// staging (2 tiles each): 195 KB at n = 128. Registers: 240 a consumer thread.
// Bound: tensor pipe, issue slots and HBM within 1.5x of each other; see docs/kernels.md.
// Not supported: p not a multiple of 64, n not 64 or 128, 32-bit types.
#pragma once
#include "../tile/sm90.cuh"
#include "chunks.cuh"
#include "params.h"

namespace mamba2::ssd::sm90 {

constexpr int kQ = 64;            // tokens a chunk: M = 64 is what one wgmma covers
constexpr int kP = 64;            // channels a unit
constexpr int kConsumers = 2;     // warpgroups; 240 registers each is what one SM holds
constexpr int kThreads = (kConsumers + 1) * tile::kWarpgroup;
constexpr int kMaxStages = 4;

enum class Schedule : int { tickets, segments };

struct FusedScanArgs {
  ptx::TensorMap x, B, C, z, y;  // (b, l, h, p), (b, l, g, n): boxes of 64 tokens x 64 columns
  Chunking chunking;
  int total_chunks;              // bound of the chunk index
  int rows;                      // b, or packed sequences
  int h, p, g, n;
  const float* delta;            // (chunks, h, q)
  const float* a_cumsum_log2;    // (chunks, h, q)
  AnyFloat D;
  bool D_per_channel;
  AnyFloat initial_states;       // (nseq, h, p, n)
  float* final_states;           // (nseq, h, p, n), optional
  StridedOut y_out;              // for ragged tails of packed sequences
  Schedule schedule;
  int tasks, segment_chunks;
  int* ticket;                   // (1)
  int* flags;                    // (rows, units): segments of the row that are done
  float* carry;                  // tickets: (rows, units, 64 n); segments: (segments, units, 64 n)
  float* through_log2;           // (segments, units): log2 of what a segment lets through

  MAMBA2_HD int p_blocks() const { return p / kP; }
  MAMBA2_HD int units() const { return h * p_blocks(); }
  MAMBA2_HD int units_per_group() const { return units() / g; }
  MAMBA2_HD int pairs_per_group() const { return ceil_div(units_per_group(), kConsumers); }
  MAMBA2_HD int pairs() const { return g * pairs_per_group(); }
};

struct Unit {
  int index, head, p_block, group;
  bool active;  // the last pair of a group with an odd number of units has an idle half
};
MAMBA2_DEVICE Unit unit_of(const FusedScanArgs& args, int pair, int half) {
  const int group = pair / args.pairs_per_group();
  const int k = pair % args.pairs_per_group() * kConsumers + half;
  const int index = group * args.units_per_group() + k;
  return {index, index / args.p_blocks(), index % args.p_blocks(), group,
          k < args.units_per_group()};
}

struct Task {
  int pair, slot, segment;  // slot: where its carry lies
  int begin, end;           // chunks
};
MAMBA2_DEVICE Task task_of(const FusedScanArgs& args, int ticket) {
  const int pairs = args.pairs(), pair = ticket % pairs;
  if (args.schedule == Schedule::segments) {
    const int segment = ticket / pairs, begin = segment * args.segment_chunks;
    return {pair, segment, segment, begin, min(begin + args.segment_chunks, args.total_chunks)};
  }
  const int row = ticket / pairs % args.rows, segment = ticket / pairs / args.rows;
  const int begin = args.chunking.first(row) + segment * args.segment_chunks;
  const int end = args.chunking.first(row) + args.chunking.count(row);
  return {pair, row, segment, begin, min(begin + args.segment_chunks, end)};
}

// What a stage holds, written by the producer beside the tiles.
struct StageInfo {
  Chunk chunk;
  int pair, slot, segment;
  bool begins_task, ends_task, exit;
};

template <class T, int kN, bool kGate>
struct alignas(1024) Stage {
  T B[kQ * kN];  // panels [token][64 n]
  T C[kQ * kN];
  T x[kConsumers][kQ * kP];
  T z[kConsumers][kGate ? kQ * kP : 8];  // (8: not used)
  float a_log2[kConsumers][kQ];
  float delta[kConsumers][kQ];
};

template <class T, int kN, bool kGate, int kStages>
struct alignas(1024) FusedScanSmem {
  Stage<T, kN, kGate> stage[kStages];
  T weights[kConsumers][kQ * kQ];  // C B^T o L o delta, [i][j]
  T y[kConsumers][kQ * kP];        // [token][p]
  float row_decay[kConsumers][kQ];    // 2^a_i
  float input_weight[kConsumers][kQ];  // 2^(a_q - a_j) delta_j
  StageInfo info[kStages];
  tile::Ring<kStages> ring;
};

// 2 or 3 stages, what fits in 227 KB.
template <class T, int kN, bool kGate>
constexpr int fused_scan_stages() {
  for (int s = 1; s < kMaxStages; ++s)
    if ((s + 1) * sizeof(Stage<T, kN, kGate>) + 36 * 1024 > 227 * 1024) return s;
  return kMaxStages;
}

// ---------------------------------------------------------------- producer
template <class T, int kN, bool kGate, int kStages, bool kStateOnly>
struct Producer {
  using Smem = FusedScanSmem<T, kN, kGate, kStages>;
  const FusedScanArgs& args;
  Smem& s;
  tile::RingPosition<kStages> at;

  MAMBA2_DEVICE void load(const Task& task, const Chunk& c, int i_chunk) {
    auto& stage = s.stage[at.stage];
    ptx::Mbarrier* full = &s.ring.full[at.stage];
    const Unit first = unit_of(args, task.pair, 0), second = unit_of(args, task.pair, 1);
    const int active = second.active ? 2 : 1;
    const uint32_t tile_bytes = kQ * kP * sizeof(T), scalar_bytes = kQ * sizeof(float);
    const uint32_t bytes = (kStateOnly ? 1 : 2) * kQ * kN * sizeof(T) +
                           active * (tile_bytes * (1 + kGate) + 2 * scalar_bytes);
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    MAMBA2_UNROLL
    for (int panel = 0; panel < kN / 64; ++panel) {
      const int offset = panel * kQ * 64;
      ptx::tma_load_4d(stage.B + offset, &args.B, panel * 64, first.group, c.token, c.row, full);
      if constexpr (!kStateOnly)
        ptx::tma_load_4d(stage.C + offset, &args.C, panel * 64, first.group, c.token, c.row, full);
    }
    for (int half = 0; half < active; ++half) {
      const Unit u = half ? second : first;
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
      for (int i = task.begin; i < task.end; ++i) {
        const Chunk c = args.chunking.at(i);
        if (c.i_seq < 0) break;
        const bool ends = i + 1 == task.end || args.chunking.at(i + 1).i_seq < 0;
        ptx::mbarrier_wait(&s.ring.empty[at.stage], at.phase ^ 1);
        s.info[at.stage] = {c, task.pair, task.slot, task.segment, i == task.begin, ends, false};
        load(task, c, i);
        at.advance();
      }
      ticket = next;
    }
    ptx::mbarrier_wait(&s.ring.empty[at.stage], at.phase ^ 1);
    s.info[at.stage].exit = true;
    ptx::mbarrier_arrive(&s.ring.full[at.stage]);
  }
};

}  // namespace mamba2::ssd::sm90
