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
// weights and of y: 218 KB at n = 128, 199 at n = 256. Registers: scorer 88, scanner 192.
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
constexpr int feeder_registers(int n) { return 40; }
constexpr int scorer_registers(int n) { return units_per_block(n) > 1 ? 88 : 72; }
constexpr int scanner_registers(int n) {
  return (512 - feeder_registers(n) - scorer_registers(n)) / kScanners;
}

enum class Schedule : int { tickets = kTickets, segments = kSegments, prefixes = kPrefixes };

struct FusedScanArgs {
  ptx::TensorMap x, z, y;  // (b, l, h, p): boxes of 64 tokens x 64 columns
  ptx::TensorMap B, C;     // (b, g, n / 64, l, 64): boxes of all columns of 64 tokens, as panels

  // What tasks are. Every role asks for this first, so it lies together, in few lines of constants.
  int* ticket;  // (1), or none: block i takes tasks i, i + blocks, ...
  Schedule schedule;
  int tasks, segment_chunks;
  int prefixes;                // the first so many tasks sum up what comes before other tasks' runs
  int run_ends[kMaxRuns];      // prefixes: of every row, chunks
  int rows;                    // b, or packed sequences
  bool pass_one;               // segments: this is it; ssd_segment_state: the only pass
  int units, units_per_group;  // set_units()
  Divisor p_blocks, pairs_per_group, pairs, rows_and_pairs;  // the last: all rows'
  Chunking chunking;
  StepInputs steps;

  int h, p, g, n;
  bool D_per_channel;
  AnyFloat D;
  AnyFloat initial_states;  // (nseq, h, p, n)
  float* final_states;      // (nseq, h, p, n), optional
  void* kept_states;        // (chunks of kept_chunking, units, 64 n)  T, images: for the backward
  Chunking kept_chunking;
  StridedOut y_out;     // for ragged tails of packed sequences
  int* flags;           // (rows, parts, units): segments of the row that are done
  float* carry;         // tickets: (rows, units, 64 n); segments: (segments, units, 64 n)
  bool carry_is_sum;    // segments: what enters the run, and not what the run adds
  float* through_log2;  // (segments, units): log2 of what a segment lets through

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

// What an instance of the kernel knows when it is compiled. Plain is what models have: rows of
// equal length with no resets inside, dt of x's type, fp32 parameters, p and n that fill their
// tiles. The questions that it does not ask are a quarter of the code, and code is what the SM's
// instruction cache has too little room for (docs/kernels.md). All else is one general instance.
template <class Element, int kStateDim, bool kHasGate, bool kIsPlain>
struct Instance {
  using T = Element;
  static constexpr int kN = kStateDim;
  static constexpr bool kGate = kHasGate, kPlain = kIsPlain;
  static constexpr int kUnits = units_per_block(kN), kParts = parts_per_unit(kN);

  static MAMBA2_DEVICE Chunking chunking(const FusedScanArgs& args, bool kept = false) {
    Chunking chunking = kept ? args.kept_chunking : args.chunking;
    if (kPlain) chunking.table = nullptr;
    return chunking;
  }
  static MAMBA2_DEVICE bool packed(const FusedScanArgs& args) {
    return chunking(args).table != nullptr;
  }
  static MAMBA2_DEVICE StepInputs steps(const FusedScanArgs& args) {
    StepInputs steps = args.steps;
    if (kPlain) steps.seq_idx = nullptr, steps.dt_dtype = DTypeOf<T>::value;
    steps.A = parameter(steps.A), steps.dt_bias = parameter(steps.dt_bias);
    return steps;
  }
  static MAMBA2_DEVICE AnyFloat parameter(AnyFloat array) {
    if (kPlain) array.dtype = DType::f32;
    return array;
  }
};
// Whether the plain instance can take this.
inline bool is_plain(const FusedScanArgs& args, DType dtype) {
  const auto is_f32 = [](const AnyFloat& array) { return !array || array.dtype == DType::f32; };
  const StepInputs& steps = args.steps;
  const bool sums_only = args.pass_one && args.final_states;  // ssd_segment_state
  return args.p % kP == 0 && args.n == padded_n(args.n) && !args.chunking.table && !steps.seq_idx &&
         steps.dt_dtype == dtype && is_f32(steps.A) && is_f32(steps.dt_bias) && is_f32(args.D) &&
         is_f32(args.initial_states) && !sums_only;
}

// Schedule::prefixes: tickets are the prefixes of all rows' later runs, these runs, the first runs.
template <class I>
MAMBA2_DEVICE Task task_of_row(const FusedScanArgs& args, int ticket) {
  const bool prefix = ticket < args.prefixes;
  const int index = prefix ? ticket : ticket - args.prefixes, round = index / args.rows_and_pairs;
  const int pair = index % args.pairs, run = index < args.prefixes ? round + 1 : 0;
  const int row = (index / args.pairs) - round * args.rows;
  const int chunk = I::chunking(args).first(row), start = run == 0 ? 0 : args.run_ends[run - 1];
  if (prefix) return {pair, row, run, chunk, chunk + start, true};
  return {pair, row, run, chunk + start, chunk + args.run_ends[run], false};
}
template <class I>
MAMBA2_DEVICE Task task_of(const FusedScanArgs& args, int ticket) {
  if (args.schedule == Schedule::prefixes) return task_of_row<I>(args, ticket);
  const int pair = ticket % args.pairs;
  const Chunking chunking = I::chunking(args);
  if (args.schedule == Schedule::segments) {
    const int segment = ticket / args.pairs, begin = segment * args.segment_chunks;
    const int end = min(begin + args.segment_chunks, chunking.first(args.rows));
    return {pair, segment, segment, begin, end, args.pass_one};
  }
  const int segment = ticket / args.rows_and_pairs;
  const int row = ticket / args.pairs - segment * args.rows;
  const int begin = chunking.first(row) + segment * args.segment_chunks;
  const int end = chunking.first(row) + chunking.count(row);
  return {pair, row, segment, begin, min(begin + args.segment_chunks, end), args.pass_one};
}
// The tickets of a block. A prefix is followed by its run, which takes the sum from the registers.
MAMBA2_DEVICE int first_ticket(const FusedScanArgs& args) {
  const int block = int(blockIdx.x);
  return block < args.prefixes ? block : block + args.prefixes;
}
// The first, where all roles know it at once: nobody hands it out, and its task has chunks. Or -1.
template <class I>
MAMBA2_DEVICE int known_ticket(const FusedScanArgs& args) {
  return args.ticket || I::packed(args) ? -1 : first_ticket(args);
}
MAMBA2_DEVICE int ticket_after(const FusedScanArgs& args, int ticket) {
  if (ticket < args.prefixes) return ticket + args.prefixes;
  return ticket < 2 * args.prefixes ? args.tasks : ticket + int(gridDim.x) - args.prefixes;
}

// The chunks of tasks one after another, for the warps that run ahead of the others. Backwards:
// from a run's last chunk to its first, or to the first of the sequence that leaves it.
template <class I>
struct Walk {
  Task task;
  int i;
  Chunk chunk;  // i_seq < 0: the task has no more
  MAMBA2_DEVICE void begin(const FusedScanArgs& args, int ticket) {
    task = task_of<I>(args, ticket);
    i = first();
    chunk = has_chunks(task) ? I::chunking(args).at(i) : Chunk{-1};
  }
  MAMBA2_DEVICE int first() const { return task.backwards ? task.end - 1 : task.begin; }
  MAMBA2_DEVICE bool exists() const { return chunk.i_seq >= 0; }
  MAMBA2_DEVICE Chunk following(const FusedScanArgs& args, int n = 1) const {
    const int left = task.backwards ? min(i - task.begin, chunk.i_c) : task.end - 1 - i;
    return n <= left ? I::chunking(args).after(chunk, i, task.backwards ? -n : n) : Chunk{-1};
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

template <class I>
constexpr int stages_of() {
  return fused_scan_stages<typename I::T, I::kN, I::kGate>();
}
template <class I>
using SmemOf = FusedScanSmem<typename I::T, I::kN, I::kGate, stages_of<I>()>;
template <class I>
using StageOf = Stage<typename I::T, I::kN, I::kGate>;

}  // namespace mamba2::ssd::sm90
