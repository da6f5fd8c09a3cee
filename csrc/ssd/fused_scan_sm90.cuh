// fused_scan (sm_90a): chunk_cumsum, chunk_state, state_passing and chunk_scan in one kernel.
//
//   y_i = 2^a_i S C_i + sum_{j <= i} 2^(a_i - a_j) delta_j (C_i . B_j) x_j + D x_i (o silu(z_i))
//   S   = 2^a_q S + sum_j 2^(a_q - a_j) delta_j x_j B_j^T                   chunk by chunk, q = 64
//
// A unit is one head's block of 64 channels (the last one of a head padded with zeros); a block of
// threads takes pairs of units of one group, which share the tiles of B and C (n = 256: one unit).
// Four warpgroups pass chunks along:
//   feeders  one warp: tasks, TMA into the ring of stages; two warps in turn: delta and the decays
//            of the tokens; one warp: y to global memory;
//   scorer   C B^T once for the pair, then C B^T o L o delta of each unit, rounded, to shared
//   memory; scanners one unit each: the state S (64 p, n) stays in fp32 accumulators; rounded, it
//   is at once
//            the A operand of S C^T, so nothing on the serial chain passes through shared memory.
//            n = 256: both share a unit, 128 columns of its state each. Each finishes y of 32
//            tokens and adds what the other's columns give it, in a fixed order, through shared
//            memory.
// All products of a scanner are transposed, (p, tokens), so that x is an A operand of both sums and
// D x and the gate are thread-local. The instructions of all roles together have to stay in the
// SM's cache: code is shared by units and warps rather than unrolled (docs/kernels.md).
//
// Work: tasks (pair, run of chunks), persistent blocks.
//   tickets:  runs follow one another through a fp32 carry in global memory, in ticket order (a
//             task waits only for one with a smaller ticket): exact, any cut gives the same bits.
//   segments: runs start from known states: pass one (backwards) computes what each run adds, from
//             its last chunk to its first, with decays up to the run's end, so that the sum is
//             never scaled; pass two adds up those before each run (many: segment_scan has done so)
//             and runs all of them at once.
//   prefixes: few rows that do not fill the card: each is cut into few runs, and the block of a
//             later run sums up itself, as pass one does, what comes before it in the row.
// Shared memory: fused_scan_stages() x (B, C: 64 n each; x, z: 64 x 64 a unit), two buffers of
// weights and of y: 218 KB at n = 128, 199 at n = 256. Registers: scorer 96, scanner 184.
// Bound: tensor pipe, HBM, shared memory and issue slots within 1.5x of each other; see
// docs/kernels.md.
// Not supported: p or n not a multiple of 8, n over 64 but 128 and 256, 32-bit types.
#pragma once
#include "../tile/sm90.cuh"
#include "chunks.cuh"
#include "fused_scan_keep_sm90.cuh"
#include "params.h"
#include "plan_sm90.h"
#include "steps.cuh"

namespace mamba2::ssd::sm90 {

constexpr int kQ = 64;        // tokens a chunk: M = 64 is what one wgmma covers
constexpr int kP = 64;        // channels a unit
constexpr int kScanners = 2;  // the registers of one SM hold no third
constexpr int kBuffers = 2;   // of weights and of y
constexpr int kMaxStages = 4;
constexpr int kTaskSlots = 4;  // tasks that the loader may be ahead of the decays' warps
constexpr int kThreads = (2 + kScanners) * tile::kWarpgroup;
constexpr int parts_per_unit(int n) { return kScanners / units_per_block(n); }
enum Role : int { kFeeders = 0, kScorer = 1, kFirstScanner = 2 };
enum Feeder : int { kLoader = 0, kFirstDecays = 1, kStorer = kFirstDecays + kBuffers };  // warps
// What one SM has: 512 registers for the four threads, one of each role, together.
constexpr int feeder_registers(int n) { return units_per_block(n) > 1 ? 48 : 40; }
constexpr int scorer_registers(int n) { return units_per_block(n) > 1 ? 96 : 72; }
constexpr int scanner_registers(int n) {
  return (512 - feeder_registers(n) - scorer_registers(n)) / kScanners;
}

enum class Schedule : int { tickets = kTickets, segments = kSegments, prefixes = kPrefixes };

struct FusedScanArgs {
  ptx::TensorMap x, z, y;  // (b, l, h, p): boxes of 64 tokens x 64 columns
  ptx::TensorMap B, C;     // (b, g, n / 64, l, 64): boxes of all columns of 64 tokens, as panels
  Chunking chunking;
  int rows;  // b, or packed sequences
  int h, p, g, n;
  StepInputs steps;
  AnyFloat D;
  bool D_per_channel;
  AnyFloat initial_states;  // (nseq, h, p, n)
  float* final_states;      // (nseq, h, p, n), optional
  void* kept_states;        // (chunks of kept_chunking, units, 64 n)  T, images: for the backward
  Chunking kept_chunking;
  StridedOut y_out;  // for ragged tails of packed sequences
  Schedule schedule;
  int tasks, segment_chunks;
  bool pass_one;           // segments: this is it; ssd_segment_state: the only pass
  int prefixes;            // the first so many tasks sum up what comes before other tasks' runs
  int run_ends[kMaxRuns];  // prefixes: of every row, chunks
  int* ticket;             // (1), or none: block i takes tasks i, i + blocks, ...
  int* flags;              // (rows, parts, units): segments of the row that are done
  float* carry;            // tickets: (rows, units, 64 n); segments: (segments, units, 64 n)
  bool carry_is_sum;       // segments: what enters the run, and not what the run adds
  float* through_log2;     // (segments, units): log2 of what a segment lets through

  int units, units_per_group;                                // set_units()
  Divisor p_blocks, pairs_per_group, pairs, rows_and_pairs;  // the last: all rows'
  void set_units() {
    p_blocks = Divisor(ceil_div(p, kP));
    units = h * p_blocks.value, units_per_group = units / g;
    pairs_per_group = Divisor(ceil_div(units_per_group, units_per_block(n)));
    pairs = Divisor(g * pairs_per_group.value), rows_and_pairs = Divisor(rows * pairs.value);
  }
};

struct Unit {
  int index, head, p_block, group;
  bool active;  // the last pair of a group with an odd number of units has an idle half
};
template <int kUnits>
MAMBA2_DEVICE Unit unit_of(const FusedScanArgs& args, int pair, int half) {
  const int group = pair / args.pairs_per_group;
  const int k = pair % args.pairs_per_group * kUnits + half;
  const int index = group * args.units_per_group + k;
  return {index, index / args.p_blocks, index % args.p_blocks, group, k < args.units_per_group};
}

struct Task {
  int pair, slot, segment;  // slot: where its carry lies
  int begin, end;           // chunks
  bool backwards;           // from the last chunk to the first: only what they add to the state
};
MAMBA2_DEVICE bool has_chunks(const Task& task) { return task.begin < task.end; }
// Schedule::prefixes: tickets are the prefixes of all rows' later runs, these runs, the first runs.
MAMBA2_DEVICE Task task_of_row(const FusedScanArgs& args, int ticket) {
  const bool prefix = ticket < args.prefixes;
  const int index = prefix ? ticket : ticket - args.prefixes, round = index / args.rows_and_pairs;
  const int pair = index % args.pairs, run = index < args.prefixes ? round + 1 : 0;
  const int row = (index / args.pairs) - round * args.rows;
  const int chunk = args.chunking.first(row), start = run == 0 ? 0 : args.run_ends[run - 1];
  if (prefix) return {pair, row, run, chunk, chunk + start, true};
  return {pair, row, run, chunk + start, chunk + args.run_ends[run], false};
}
MAMBA2_DEVICE Task task_of(const FusedScanArgs& args, int ticket) {
  if (args.schedule == Schedule::prefixes) return task_of_row(args, ticket);
  const int pair = ticket % args.pairs;
  if (args.schedule == Schedule::segments) {
    const int segment = ticket / args.pairs, begin = segment * args.segment_chunks;
    const int end = min(begin + args.segment_chunks, args.chunking.first(args.rows));
    return {pair, segment, segment, begin, end, args.pass_one};
  }
  const int segment = ticket / args.rows_and_pairs;
  const int row = ticket / args.pairs - segment * args.rows;
  const int begin = args.chunking.first(row) + segment * args.segment_chunks;
  const int end = args.chunking.first(row) + args.chunking.count(row);
  return {pair, row, segment, begin, min(begin + args.segment_chunks, end), args.pass_one};
}
// The tickets of a block. A prefix is followed by its run, which takes the sum from the registers.
MAMBA2_DEVICE int first_ticket(const FusedScanArgs& args) {
  const int block = int(blockIdx.x);
  return block < args.prefixes ? block : block + args.prefixes;
}
MAMBA2_DEVICE int ticket_after(const FusedScanArgs& args, int ticket) {
  if (ticket < args.prefixes) return ticket + args.prefixes;
  return ticket < 2 * args.prefixes ? args.tasks : ticket + int(gridDim.x) - args.prefixes;
}

// The chunks of tasks one after another, for the warps that run ahead of the others. Backwards:
// from a run's last chunk to its first, or to the first of the sequence that leaves it.
struct Walk {
  Task task;
  int i;
  Chunk chunk;  // i_seq < 0: the task has no more
  MAMBA2_DEVICE void begin(const FusedScanArgs& args, int ticket) {
    task = task_of(args, ticket);
    i = first();
    chunk = has_chunks(task) ? args.chunking.at(i) : Chunk{-1};
  }
  MAMBA2_DEVICE int first() const { return task.backwards ? task.end - 1 : task.begin; }
  MAMBA2_DEVICE bool exists() const { return chunk.i_seq >= 0; }
  MAMBA2_DEVICE Chunk following(const FusedScanArgs& args, int n = 1) const {
    const int left = task.backwards ? min(i - task.begin, chunk.i_c) : task.end - 1 - i;
    return n <= left ? args.chunking.after(chunk, i, task.backwards ? -n : n) : Chunk{-1};
  }
  MAMBA2_DEVICE void go_to(const Chunk& following, int n = 1) {
    chunk = following, i += task.backwards ? -n : n;
  }
};

// What a stage holds, written by the loader beside the tiles.
enum StageFlag : int {
  kExit = 1,
  kBeginsTask = 2,
  kEndsTask = 4,
  kBeginsSequence = 8,
  kEndsSequence = 16,
  kBackwards = 32
};
struct alignas(16) StageInfo {
  int flags, row, token, count;  // first: what every chunk wants, in one load
  int i_seq, pair, slot, segment;
  int kept_at;  // 2 x chunk of kept_chunking, odd in the middle of one; odd, too, if none is kept
};

template <class T, int kN, bool kGate>
struct alignas(1024) Stage {
  static constexpr int kUnits = units_per_block(kN);
  T B[kQ * kN];  // panels [token][64 n]
  T C[kQ * kN];
  T x[kUnits][kQ * kP];
  T z[kUnits][kGate ? kQ * kP : 8];  // (8: not used)
};

// A value of every token in the order in which a scanner's lane wants them, four in one load: those
// of its columns 8 k + 2 (lane % 4) + {0, 1} lie together. (Four floats of padding: the four kinds
// of lanes read different banks.)
struct alignas(16) TokenValues {
  float values[4][kQ / 4 + 4];
  MAMBA2_DEVICE float2& pair(int i) {  // of tokens 2 i and 2 i + 1
    return *reinterpret_cast<float2*>(&values[i & 3][(i >> 2) * 2]);
  }
  MAMBA2_DEVICE float last() const { return values[3][kQ / 4 - 1]; }
  // Of columns 16 step + {0, 1} and {8, 9} + 2 (lane % 4).
  MAMBA2_DEVICE float4 of_lane(int lane, int step) const {
    return *reinterpret_cast<const float4*>(&values[lane % 4][4 * step]);
  }
};

// What the decays' warps and the scorer hand to the scanners.
template <class T, int kUnits>
struct alignas(1024) Weights {
  T scores[kUnits][kQ * kQ];  // C B^T o L o delta, [i][j]
  float a_log2[kUnits][kQ];   // log2 decay from the chunk's start to behind the token
  float delta[kUnits][kQ];
  float column_weight[kUnits][kQ];   // 2^(a_e - a_j) delta_j, e the end of j's block of 16
  TokenValues row_decay[kUnits];     // 2^a_i
  TokenValues input_weight[kUnits];  // 2^(a_q - a_j) delta_j
};

// What the scanners of one unit send to each other, four floats at a time: (64 p, tokens of the
// other) of S C^T.
template <int kParts>
struct alignas(16) Exchange {
  float partial[kParts][kP * kQ / kParts];
  tile::Ring<1> ring[kParts];
};
template <>
struct Exchange<1> {};

template <class T, int kN, bool kGate, int kStages>
struct alignas(1024) FusedScanSmem {
  static constexpr int kUnits = units_per_block(kN);
  Stage<T, kN, kGate> stage[kStages];
  Weights<T, kUnits> weights[kBuffers];
  T y[kBuffers][kUnits][kQ * kP];  // [token][p]
  StageInfo info[kStages];
  int tickets[kTaskSlots];  // of tasks, from the loader to the decays' warps
  tile::Ring<kTaskSlots> tickets_ring;
  tile::Ring<kStages> ring;
  tile::Ring<kBuffers> weights_ring;
  tile::Ring<kBuffers> decays_ring;  // their decays alone, for the scorer (n 256: also scanners)
  tile::Ring<kBuffers> y_ring[kUnits];
  Exchange<parts_per_unit(kN)> exchange;
};

// As many stages as 227 KB hold.
template <class T, int kN, bool kGate>
constexpr int fused_scan_stages() {
  constexpr int kUnits = units_per_block(kN);
  constexpr int rest = kBuffers * int(sizeof(Weights<T, kUnits>) + sizeof(T) * kUnits * kQ * kP) +
                       int(sizeof(Exchange<parts_per_unit(kN)>)) + 2048;
  for (int s = kMaxStages; s > 1; --s)
    if (s * int(sizeof(Stage<T, kN, kGate>)) + rest <= 227 * 1024) return s;
  return 1;
}

}  // namespace mamba2::ssd::sm90
