// fused_scan (sm_90a): chunk_state, state_passing and chunk_scan in one kernel.
//
//   y_i = 2^a_i S C_i + sum_{j <= i} 2^(a_i - a_j) delta_j (C_i . B_j) x_j + D x_i     (times silu(z_i))
//   S   = 2^a_q S + sum_j 2^(a_q - a_j) delta_j x_j B_j^T                     chunk by chunk, q = 64
//
// A unit is one head's block of 64 channels; a block of threads takes pairs of units of one group,
// which share the tiles of B and C. Four warpgroups pass chunks along:
//   loader   one thread: tickets, TMA into the ring of stages; one warp: decays of the tokens;
//   scorer   C B^T once for the pair, then C B^T o L o delta of each unit, rounded, to shared memory;
//   scanners one unit each: the state S (64 p, n) stays in fp32 accumulators; rounded, it is at once
//            the A operand of S C^T, so nothing on the serial chain passes through shared memory.
// All products of a scanner are transposed, (p, tokens), so that x is an A operand of both sums and
// D x and the gate are thread-local.
//
// Work: tasks (pair, run of chunks), persistent blocks.
//   tickets:  runs follow one another through a fp32 carry in global memory, in ticket order (a task
//             waits only for one with a smaller ticket): exact, any cut gives the same bits.
//   segments: runs start from known states: pass one (kStateOnly) computes what each run adds,
//             segment_scan adds them up, pass two runs all of them at once.
// Shared memory: fused_scan_stages() x (B, C: 64 n each; x, z: 64 x 64 a unit), two buffers of
// weights and of y: 218 KB at n = 128. Registers: scorer 96, scanner 184.
// Bound: tensor pipe, HBM and issue slots within 1.5x of each other; see docs/kernels.md.
// Not supported: p not a multiple of 64, n not 64 or 128, 32-bit types.
#pragma once
#include "../tile/sm90.cuh"
#include "chunks.cuh"
#include "params.h"

namespace mamba2::ssd::sm90 {

constexpr int kQ = 64;      // tokens a chunk: M = 64 is what one wgmma covers
constexpr int kP = 64;      // channels a unit
constexpr int kUnits = 2;   // scanners; the registers of one SM hold no third
constexpr int kBuffers = 2;  // of weights and of y
constexpr int kMaxStages = 4;
constexpr int kThreads = (2 + kUnits) * tile::kWarpgroup;
enum Role : int { kLoader = 0, kScorer = 1, kFirstScanner = 2 };
// What one SM has: 512 registers for the four threads, one of each role, together.
constexpr int kLoaderRegisters = 48, kScorerRegisters = 96, kScannerRegisters = 184;

enum class Schedule : int { tickets, segments };

struct FusedScanArgs {
  ptx::TensorMap x, B, C, z, y;  // (b, l, h, p), (b, l, g, n): boxes of 64 tokens x 64 columns
  Chunking chunking;
  int total_chunks;            // bound of the chunk index
  int rows;                    // b, or packed sequences
  int h, p, g, n;
  const float* delta;          // (chunks, h, q)
  const float* a_cumsum_log2;  // (chunks, h, q)
  AnyFloat D;
  bool D_per_channel;
  AnyFloat initial_states;     // (nseq, h, p, n)
  float* final_states;         // (nseq, h, p, n), optional
  StridedOut y_out;            // for ragged tails of packed sequences
  Schedule schedule;
  int tasks, segment_chunks;
  int* ticket;                 // (1)
  int* flags;                  // (rows, units): segments of the row that are done
  float* carry;                // tickets: (rows, units, 64 n); segments: (segments, units, 64 n)
  float* through_log2;         // (segments, units): log2 of what a segment lets through

  int p_blocks, units, units_per_group, pairs_per_group, pairs;  // set_units()
  void set_units() {
    p_blocks = p / kP, units = h * p_blocks, units_per_group = units / g;
    pairs_per_group = ceil_div(units_per_group, kUnits), pairs = g * pairs_per_group;
  }
};

struct Unit {
  int index, head, p_block, group;
  bool active;  // the last pair of a group with an odd number of units has an idle half
};
MAMBA2_DEVICE Unit unit_of(const FusedScanArgs& args, int pair, int half) {
  const int group = pair / args.pairs_per_group;
  const int k = pair % args.pairs_per_group * kUnits + half;
  const int index = group * args.units_per_group + k;
  return {index, index / args.p_blocks, index % args.p_blocks, group,
          k < args.units_per_group};
}

struct Task {
  int pair, slot, segment;  // slot: where its carry lies
  int begin, end;           // chunks
};
MAMBA2_DEVICE Task task_of(const FusedScanArgs& args, int ticket) {
  const int pairs = args.pairs, pair = ticket % pairs;
  if (args.schedule == Schedule::segments) {
    const int segment = ticket / pairs, begin = segment * args.segment_chunks;
    return {pair, segment, segment, begin, min(begin + args.segment_chunks, args.total_chunks)};
  }
  const int row = ticket / pairs % args.rows, segment = ticket / pairs / args.rows;
  const int begin = args.chunking.first(row) + segment * args.segment_chunks;
  const int end = args.chunking.first(row) + args.chunking.count(row);
  return {pair, row, segment, begin, min(begin + args.segment_chunks, end)};
}

// What a stage holds, written by the loader beside the tiles.
enum StageFlag : int {
  kExit = 1,
  kBeginsTask = 2,
  kEndsTask = 4,
  kBeginsSequence = 8,
  kEndsSequence = 16
};
struct alignas(16) StageInfo {
  int flags, row, token, count;  // first: what every chunk wants, in one load
  int i_seq, pair, slot, segment;
};

template <class T, int kN, bool kGate>
struct alignas(1024) Stage {
  T B[kQ * kN];  // panels [token][64 n]
  T C[kQ * kN];
  T x[kUnits][kQ * kP];
  T z[kUnits][kGate ? kQ * kP : 8];  // (8: not used)
  float a_log2[kUnits][kQ];
  float delta[kUnits][kQ];
};

// What the scorer hands to the scanners.
template <class T>
struct alignas(1024) Weights {
  T scores[kUnits][kQ * kQ];        // C B^T o L o delta, [i][j]
  float row_decay[kUnits][kQ];      // 2^a_i
  float input_weight[kUnits][kQ];   // 2^(a_q - a_j) delta_j
  float column_weight[kUnits][kQ];  // 2^(a_e - a_j) delta_j, e the end of j's block of 16
};

template <class T, int kN, bool kGate, int kStages>
struct alignas(1024) FusedScanSmem {
  Stage<T, kN, kGate> stage[kStages];
  Weights<T> weights[kBuffers];
  T y[kBuffers][kUnits][kQ * kP];  // [token][p]
  StageInfo info[kStages];
  tile::Ring<kStages> ring;
  tile::Ring<kBuffers> weights_ring;
  tile::Ring<kBuffers> decays_ring;  // their decays alone, for the scorer
};

// As many stages as 227 KB hold.
template <class T, int kN, bool kGate>
constexpr int fused_scan_stages() {
  constexpr int rest = kBuffers * int(sizeof(Weights<T>) + sizeof(T) * kUnits * kQ * kP) + 2048;
  for (int s = kMaxStages; s > 1; --s)
    if (s * int(sizeof(Stage<T, kN, kGate>)) + rest <= 227 * 1024) return s;
  return 1;
}

}  // namespace mamba2::ssd::sm90
