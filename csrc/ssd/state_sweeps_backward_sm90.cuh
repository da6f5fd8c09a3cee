// state_sweeps (sm_90a): its shared memory, what a block sweeps over, its loads, and what a token
// weighs.
#pragma once
#include "scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90::sweeps {

constexpr int stages_of(int heads) { return heads > 2 ? 3 : 4; }
constexpr int consumer_threads(int heads) { return heads * tile::kWarpgroup; }
constexpr int threads_of(int heads) { return consumer_threads(heads) + 32; }
enum Barriers { kTailBarrier = 1, kHeadBarriers };

// Chunks from one count of progress to the next.
constexpr int kPublishedChunks = 8;
// Chunks of a sequence whose middle is ready long before its ends.
constexpr int kLongSequence = 4 * kPublishedChunks;
constexpr int kTokensAStep = 16, kSteps = kBlock / kTokensAStep;  // of a product
// In two words are the tokens next to the chunk's other end, and of the others those of which the
// state keeps more than this until there; but no more than kMostSeconds steps of a block.
constexpr float kTwoWordsLog2 = -1;
constexpr int kMostSeconds = 2;

// What the warpgroup of a head does with a block of 64 tokens.
struct BlockPlan {
  float decay;
  int seconds;  // steps with a second word, from the nearest to the chunk's other end on
};

template <class T, int kN, int kHeads>
struct alignas(1024) SweepStage {
  T operand[kBlock * kN];               // B or C: panels [token][64 n]
  T tokens[kHeads][kBlock * kHeadDim];  // x or dy: [token][p]
};
template <class T, int kN, int kHeads>
struct alignas(1024) SweepSmem {
  static constexpr int kStages = stages_of(kHeads);
  SweepStage<T, kN, kHeads> stage[kStages];
  T image[2][kHeads][kHeadDim * kN];              // by parity of the chunk
  PairWeights weight[2][kHeads][kBackwardQ / 2];  // likewise, of two tokens each
  BlockPlan plan[2][kHeads][2];                   // likewise, of its blocks
  float through[kHeads][4];                       // by warp
  tile::Ring<kStages> ring;
  ptx::Mbarrier all_stored;
};

// What one block sweeps over.
struct Sweep {
  bool reverse;
  int i_seq, group, first_head, heads;
  int first_chunk, chunks;
  int added;  // of these, to the state: all but the last, unless the state behind it is asked for
  Sequence sequence;
  MAMBA2_DEVICE Sweep(const BackwardArgs& args, int heads_at_once, bool reverse)
      : reverse(reverse) {
    const int sets = ceil_div(args.heads_per_group(), heads_at_once);
    const int skipped = blockIdx.x % sets * heads_at_once;
    group = blockIdx.x / sets % args.g;
    i_seq = blockIdx.x / sets / args.g;
    first_head = group * args.heads_per_group() + skipped;
    heads = min(heads_at_once, args.heads_per_group() - skipped);
    first_chunk = args.chunking.first(i_seq);
    chunks = args.chunking.count(i_seq);
    added = chunks - !(reverse && args.d_initial_states);
    sequence = args.chunking.sequence(i_seq);
  }
  // The k-th chunk on the way: its place in the sequence, its number among all chunks, and what
  // Chunking::at says of it, with no division.
  MAMBA2_DEVICE int place(int k) const { return reverse ? chunks - 1 - k : k; }
  MAMBA2_DEVICE int number(int k) const { return first_chunk + place(k); }
  MAMBA2_DEVICE Chunk chunk(int k) const {
    const int i_c = place(k), first = i_c * kBackwardQ, left = int(sequence.length) - first;
    return {i_seq, sequence.row,     int(sequence.token) + first, min(kBackwardQ, left),
            i_c,   i_c == chunks - 1};
  }
};
MAMBA2_DEVICE int blocks_of(const Chunk& chunk) { return chunk.count > kBlock ? 2 : 1; }
// The block that is the step-th on the way through a chunk.
MAMBA2_DEVICE int block_of(const Chunk& chunk, const Sweep& sweep, int step) {
  return sweep.reverse ? blocks_of(chunk) - 1 - step : step;
}

MAMBA2_DEVICE void publish(const BackwardArgs& args, const Sweep& sweep, int chunks) {
  int* progress = args.progress_of(sweep.reverse, sweep.i_seq, sweep.first_head);
  tile::publish(progress, chunks, sweep.heads);
}

template <class T, int kN, int kHeads>
MAMBA2_DEVICE void produce(const BackwardArgs& args, SweepSmem<T, kN, kHeads>& s,
                           const Sweep& sweep) {
  const ptx::TensorMap* operand = sweep.reverse ? &args.C : &args.B;
  const ptx::TensorMap* tokens = sweep.reverse ? &args.dy : &args.x;
  const uint32_t bytes = sizeof(T) * kBlock * (kN + sweep.heads * kHeadDim);
  tile::RingPosition<stages_of(kHeads)> at;
  for (int k = 0; k < sweep.added; ++k) {
    const Chunk chunk = sweep.chunk(k);
    for (int step = 0; step < blocks_of(chunk); ++step) {
      auto& stage = s.stage[at.stage];
      ptx::Mbarrier* full = &s.ring.full[at.stage];
      const int token = chunk.token + block_of(chunk, sweep, step) * kBlock;
      ptx::mbarrier_wait(&s.ring.empty[at.stage], at.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      for (int panel = 0; panel < kN / 64; ++panel)
        ptx::tma_load_4d(stage.operand + panel * kBlock * 64, operand, panel * 64, sweep.group,
                         token, chunk.row, full);
      for (int i = 0; i < sweep.heads; ++i)
        ptx::tma_load_4d(stage.tokens[i], tokens, args.channel(sweep.first_head + i),
                         args.tensor_head(sweep.first_head + i), token, chunk.row, full);
      at.advance();
    }
    // The consumers have given back tokens of the chunk before the last one: all states but the one
    // before that one's are stored. It is said here, where nobody waits for it.
    const int stored = k - 3;
    if (args.progress && stored > 0 && stored % kPublishedChunks == 0) publish(args, sweep, stored);
  }
  if (!args.progress) return;
  ptx::mbarrier_wait(&s.all_stored, 0);
  publish(args, sweep, sweep.chunks);
}

// A token of the chunk, the ends of its block and of the one before, and the end of the chunk.
struct Scalars {
  float a_log2 = 0, delta = 0, a_end_log2 = 0, a_before_log2 = 0, a_last_log2 = 0;
  MAMBA2_DEVICE Scalars() {}
  MAMBA2_DEVICE Scalars(const BackwardArgs& args, int chunk, int tensor_head, int token) {
    const int64_t at = (int64_t(chunk) * args.tensor_h + tensor_head) * kBackwardQ;
    a_log2 = args.a_cumsum_log2[at + token];
    delta = args.delta[at + token];
    const int block = token / kBlock * kBlock;
    a_end_log2 = args.a_cumsum_log2[at + block + kBlock - 1];
    a_before_log2 = block > 0 ? args.a_cumsum_log2[at + block - 1] : 0.f;
    a_last_log2 = args.a_cumsum_log2[at + kBackwardQ - 1];
  }
  // What the token adds to the state at the block's end, or its beginning; what the block lets
  // through.
  MAMBA2_DEVICE float weight(bool reverse) const {
    return reverse ? ptx::ex2(a_log2 - a_before_log2) : ptx::ex2(a_end_log2 - a_log2) * delta;
  }
  // The token of a block that knows its plan: of the second step from the chunk's other end, the
  // token nearest to that end.
  MAMBA2_DEVICE static int planner(bool reverse) {
    return reverse ? kTokensAStep - 1 : kBlock - kTokensAStep - 1;
  }
  MAMBA2_DEVICE BlockPlan plan(bool reverse) const {
    const float next_log2 = reverse ? a_log2 : a_last_log2 - a_log2;
    const float nearest_log2 = reverse ? a_before_log2 : a_last_log2 - a_end_log2;
    return {ptx::ex2(a_end_log2 - a_before_log2),
            (nearest_log2 > kTwoWordsLog2) + (next_log2 > kTwoWordsLog2)};
  }
};

}  // namespace mamba2::ssd::sm90::sweeps
