// chunk_scan_backward (sm_90a): its shared memory, its sums, and what both consumers do.
#pragma once
#include "slices_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

constexpr int kScanConsumers = 3 * tile::kWarpgroup;
constexpr int kScanThreads = kScanConsumers + tile::kWarpgroup;
constexpr int kSideWarps = tile::kWarpgroup / 32, kConsumerWarps = kScanConsumers / 32;
constexpr int kFinishWarps = 3;  // of the producer's warpgroup

// How the two token sides share out the work, and what follows from it.
template <int kN>
struct ScanShape {
  // Token sides that work on one head: two, a half of its columns and channels each; or one, so
  // that the two are at different heads and neither waits for the other, where a thread's
  // registers hold all columns.
  static constexpr int kSharers = kN > 64 ? 2 : 1;
  // Own tokens are folded (below).
  static constexpr bool kFolded = kSharers == 2;
  static constexpr int kHeadWarps = kSideWarps * (1 + kSharers);  // consumers of one head
  static constexpr int kTokenStages = kSharers == 2 ? 3 : 4, kStateStages = kSharers == 2 ? 2 : 3;
  static constexpr int kResultStages = kStateStages, kDxTiles = kStateStages - 1;
  // Whether dCB of the own block is multiplied in two words. At n = 64 ptxas then orders the whole
  // kernel in a way that takes 2% longer.
  static constexpr bool kRestOfdCB = kN > 64;
  // Registers a thread of each side; together 512, the share of a thread of each of four
  // warpgroups.
  static constexpr int kState = kN > 64 ? 200 : 136, kTokens = kN > 64 ? 136 : 168, kOthers = 40;
};

// Where the i-th head of a task lies in a ring.
template <int kStages>
struct Slot {
  int stage;
  uint32_t phase;
  MAMBA2_DEVICE explicit Slot(int i) : stage(i % kStages), phase(i / kStages & 1) {}
  // That of the next head, with no division.
  MAMBA2_DEVICE Slot next() const {
    Slot at = *this;
    if (++at.stage == kStages) at.stage = 0, at.phase ^= 1;
    return at;
  }
};
template <int kN>
using TokenSlot = Slot<ScanShape<kN>::kTokenStages>;
template <int kN>
using StateSlot = Slot<ScanShape<kN>::kStateStages>;
template <int kN>
using ResultSlot = Slot<ScanShape<kN>::kResultStages>;

// The tokens of one head.
template <class T>
struct alignas(1024) TokenStage {
  T x[kBlock * kHeadDim];      // own tokens
  T dy[2][kBlock * kHeadDim];  // own tokens; in the earlier block the later ones too
  // In the earlier block of the whole chunk, in the later one of its own tokens.
  float a_log2[kBackwardQ];
  float a_run_log2[kBackwardQ];
  float delta[kBackwardQ];
  float D[kHeadDim];
};
// Its states: half of all bytes, and done with sooner than the tokens.
template <class T, int kN>
struct alignas(1024) StateStage {
  T S[kHeadDim * kN];  // panels [p][64 n]
  T G[kHeadDim * kN];
};

// Own tokens as the j of pairs are *folded* where columns are shared: of the 8 times 8 tokens of
// the block, the rows of warp w are the w-th eight from the beginning and the w-th from the end, so
// that all warps have equally many pairs i >= j. So lie the tiles of x and B, the panels of dCB,
// and all accumulators (j, .). The eight of tokens that is the half-th of a warp's two, and where
// it lies:
template <class Shape>
MAMBA2_DEVICE int own_eight(int warp, int half) {
  if (!Shape::kFolded) return 2 * warp + half;
  return half == 0 ? warp : kBlock / 8 - 1 - warp;
}
template <class Shape>
MAMBA2_DEVICE int place_of_eight(int eight) {
  if (!Shape::kFolded) return eight;
  return eight < kBlock / 16 ? 2 * eight : kBlock / 4 - 1 - 2 * eight;
}
// The own token of this lane's half-th row of an accumulator (j, .).
template <class Shape>
MAMBA2_DEVICE int own_row(const tile::Lane& me, int half) {
  return 8 * own_eight<Shape>(me.warp, half) + me.lane / 4;
}
// From where a lane finds its row of a fragment to where that is in a folded panel, and the other
// way round: in elements. (Not as rows: the swizzle is the same, and its arithmetic is done once.)
template <class Shape>
MAMBA2_DEVICE int to_folded(const tile::Lane& me) {
  const int eight = 2 * me.warp + (me.lane >> 3 & 1);
  return (place_of_eight<Shape>(eight) - eight) * 8 * tile::kPanelColumns;
}
template <class Shape>
MAMBA2_DEVICE int to_unfolded(const tile::Lane& me) {
  const int half = me.lane >> 3 & 1;
  return (own_eight<Shape>(me.warp, half) - 2 * me.warp - half) * 8 * tile::kPanelColumns;
}

// What the consumers leave of one head for the finishing side; dx is apart.
struct alignas(16) HeadResults {
  float E[kBlock];
  float F[2][kBlock];     // F_j / delta_j, by sharer
  float V[2][kBlock];     // sum_{i>j} V_ij, by sharer
  float delta[kBlock];    // delta_j
  float R[2][4][kBlock];  // own and later columns, by warp
  float dy_x[kBlock];     // dy_j . x_j = U_jj
  float dD[4][kHeadDim];  // by warp, when D is per channel
  float through;          // 2^a_q
  float K[kFinishWarps];  // <G, S>, by warp
};

// L o C B^T on its way from one sharer to the other, fragments: [buffer][side][register / 4]
// [thread].
struct Exchange {
  uint4 m[2][2][2][tile::kWarpgroup];
};
// (C B^T)^T of the own block, accumulators: of each warp's columns from its own 16 tokens on,
// [element / 4][lane], one warp after another.
struct OwnBC {
  float4 groups[20][32];
};

template <class T, int kN>
struct alignas(1024) ChunkScanBackwardSmem {
  using Shape = ScanShape<kN>;
  TokenStage<T> tokens[Shape::kTokenStages];
  StateStage<T, kN> states[Shape::kStateStages];
  T B[kBlock * kN];                          // own tokens: panels [token][64 n]
  T C[kBlock * kN];                          // own tokens
  T dx[Shape::kDxTiles][kBlock * kHeadDim];  // [token][p]
  // (C B^T)^T of the later block's tokens, accumulators: [element / 4][thread], by sharer.
  float4 BC_later[8][tile::kWarpgroup];
  std::conditional_t<Shape::kSharers == 2, Exchange, OwnBC> between;
  float BC_diagonal[kBlock];  // C_j . B_j
  HeadResults results[Shape::kResultStages];
  tile::Ring<Shape::kTokenStages> tokens_ring;
  tile::Ring<Shape::kStateStages> states_ring;
  tile::Ring<Shape::kResultStages> results_ring;
  ptx::Mbarrier group_full;  // B and C are in
  // The same, and tokens, of a ragged chunk before its last rows are cleared.
  ptx::Mbarrier group_loaded, tokens_loaded[Shape::kTokenStages];
  ptx::Mbarrier dx_empty[Shape::kDxTiles];  // the finishing side has read one
  // After the last head, where consumers meet; at the second one of slices also the loader, who has
  // then seen to it that `parts` may be written to.
  ptx::Mbarrier tokens_done, dCB_full;
  float* parts;
  // With resets: of the own tokens and, in the earlier block, the later ones, the last token up to
  // it at which the state resets, counted from the own block's first; 0 where there is none.
  int run_first[2 * kBlock];

  // C of the later tokens: until C B^T takes its place, and again after the last head, in the ring
  // of states.
  MAMBA2_DEVICE T* later_C() { return reinterpret_cast<T*>(BC_later); }
  MAMBA2_DEVICE T* later_C_again(int heads) { return states[StateSlot<kN>(heads).stage].S; }
};

// A target is a block of tokens i: the own one, or (in the earlier block) the later one.
enum Target { kOwn = 0, kLater = 1 };
enum ScanBarriers {
  kTokenSidesBarrier = 1,
  kStateSideBarrier,
  kExchangeBarriers  // 4: by warp
};

// Which tokens and heads a block works on.
struct ScanTask {
  int i_chunk, block, group, pair, first_head, heads;
  Chunk chunk;
  // A single slice has no division to wait for.
  MAMBA2_DEVICE ScanTask(const BackwardArgs& args, bool sliced) : group(blockIdx.y) {
    if (args.unpaired_pairs == args.pairs()) {
      pair = blockIdx.x;
      block = blockIdx.z;
    } else {
      const int unpaired = group == args.g - 1 ? args.unpaired_pairs : 0;
      const int paired = args.pairs() - unpaired, i = blockIdx.x - 2 * paired;
      block = i < 0 ? i & 1 : i >= unpaired;
      pair = i < 0 ? blockIdx.x / 2 : paired + i - block * unpaired;
    }
    const int i = sliced ? pair / args.slices : pair;
    i_chunk = chunk_in_order(args, i);
    chunk = args.chunking.at(i_chunk);
    const int slice = sliced ? pair - i * args.slices : 0;
    first_head = args.first_head(group, slice);
    heads = min(args.heads_per_slice, args.heads_per_group() - slice * args.heads_per_slice);
  }
  // The last block of the grid.
  MAMBA2_DEVICE bool ends_grid() const {
    return blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1 &&
           blockIdx.z == gridDim.z - 1;
  }
  // Where arrays of all chunks have a head. They are so few that 32 bits count them.
  MAMBA2_DEVICE int at(const BackwardArgs& args, int head) const { return i_chunk * args.h + head; }
  MAMBA2_DEVICE int own() const { return own_of(chunk.count); }
  MAMBA2_DEVICE int own_of(int count) const { return max(0, min(kBlock, count - block * kBlock)); }
  // Rows of tiles beyond this belong to a neighbour. Read anew: kept, it would cost registers.
  MAMBA2_DEVICE int valid(const BackwardArgs& args) const {
    return args.chunking.table ? args.chunking.table[i_chunk].z : kBackwardQ;
  }
  // Whether there are such rows. The finishing side clears them before the consumers see a tile.
  MAMBA2_DEVICE bool ragged(const BackwardArgs& args) const { return valid(args) < kBackwardQ; }
};

// How far state_sweeps, which may still run, must have come for a chunk. It is looked up anew:
// kept, it would cost all sides' registers.
struct SweepsBefore {
  const int *S_chunks, *G_chunks;  // of the task's first head
  int for_S, for_G;
  MAMBA2_DEVICE SweepsBefore(const BackwardArgs& args, const ScanTask& task) {
    const Chunk chunk = args.chunking.at(ptx::anew(task.i_chunk));
    S_chunks = args.progress_of(false, chunk.i_seq, task.first_head);
    G_chunks = args.progress_of(true, chunk.i_seq, task.first_head);
    for_S = chunk.i_c + 1;
    for_G = args.chunking.count(chunk.i_seq) - chunk.i_c;
  }
  // Until S and G of the task's i-th head are stored; so is what comes before them, D's row too.
  MAMBA2_DEVICE void wait(int i) const {
    tile::wait_published(S_chunks + i, for_S);
    tile::wait_published(G_chunks + i, for_G);
  }
};

// Rows from `count` on become zero; tokens from `count` on of a tile that may be folded.
template <int kColumns, class T>
MAMBA2_DEVICE void clear_rows(T* tile, int count, int thread, int threads) {
  for (int panel = 0; panel < kColumns / 64; ++panel)
    tile::zero_rows<kBlock>(tile + panel * kBlock * 64, count, thread, threads);
}
template <class Shape, int kColumns, class T>
MAMBA2_DEVICE void clear_own_rows(T* tile, int count, int thread, int threads) {
  if (!Shape::kFolded) return clear_rows<kColumns>(tile, count, thread, threads);
  for (int panel = 0; panel < kColumns / 64; ++panel) {
    for (int eight = count / 8; eight < kBlock / 8; ++eight) {
      const int place = panel * kBlock / 8 + place_of_eight<Shape>(eight);
      tile::zero_rows<8>(tile + place * 8 * tile::kPanelColumns, max(0, count - 8 * eight), thread,
                         threads);
    }
  }
}

// Row by row, a fragment times an accumulator of the same shape: adds this lane's part of the sum.
template <class T, int kPairs>
MAMBA2_DEVICE void add_row_dots(float (&sum)[2], const uint32_t (&a)[kPairs], const float* d) {
  MAMBA2_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const float2 v = unpack2<T>(a[i]);
    sum[i & 1] += v.x * d[2 * i];
    sum[i & 1] += v.y * d[2 * i + 1];
  }
}
// Adds up the four lanes that share a row.
MAMBA2_DEVICE float row_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}
// Lanes `bit` apart share out 2 kWidth columns: each keeps half of them, both parts added up.
template <int kWidth, int kAll>
MAMBA2_DEVICE void share_columns(float (&v)[kAll], int lane, int bit) {
  const bool upper = lane & bit;
  MAMBA2_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float keep = upper ? v[i + kWidth] : v[i];
    const float give = upper ? v[i] : v[i + kWidth];
    v[i] = keep + __shfl_xor_sync(kAllLanes, give, bit);
  }
}
// A lane's parts of its 16 columns (two of each 8), added up over the 8 lanes that share them, to
// sums[64]. Three exchanges leave two columns a lane.
MAMBA2_DEVICE void column_sums(float (&v)[16], float* sums, int lane) {
  share_columns<8>(v, lane, 16);
  share_columns<4>(v, lane, 8);
  share_columns<2>(v, lane, 4);
  *reinterpret_cast<float2*>(sums + 2 * lane) = float2{v[0], v[1]};
}

// The same of every second 8 columns: 8 values, to `sums` of the first of them on.
MAMBA2_DEVICE void alternate_column_sums(float (&v)[8], float* sums, int lane) {
  share_columns<4>(v, lane, 16);
  share_columns<2>(v, lane, 8);
  share_columns<1>(v, lane, 4);
  sums[16 * (lane >> 3) + 2 * (lane & 3) + (lane >> 2 & 1)] = v[0];
}

// What all consumer warpgroups have and do.
template <class T, int kN>
struct ScanConsumer {
  using Shape = ScanShape<kN>;
  const BackwardArgs& args;
  ChunkScanBackwardSmem<T, kN>& s;
  const ScanTask& task;
  const int thread;  // of the warpgroup
  tile::Lane me;

  MAMBA2_DEVICE ScanConsumer(const BackwardArgs& args, ChunkScanBackwardSmem<T, kN>& s,
                             const ScanTask& task)
      : args(args), s(s), task(task), thread(threadIdx.x % tile::kWarpgroup), me(threadIdx.x) {}

  // A head's results are there. Every thread says so of its own: compute-sanitizer takes the
  // arrival of one lane for a warp as that lane's alone.
  MAMBA2_DEVICE void results_full(const ResultSlot<kN>& slot) const {
    ptx::mbarrier_arrive(&s.results_ring.full[slot.stage]);
  }
  // Waits for the other consumers. They come from several places in the code: bar.sync is for
  // threads that all come to the same one.
  MAMBA2_DEVICE void meet(ptx::Mbarrier* others) const {
    ptx::mbarrier_arrive(others);
    ptx::mbarrier_wait(others, 0);
  }
  // Columns from `column` on of one of this block's parts.
  template <int kElements>
  MAMBA2_DEVICE void store(Part part, int column, const float (&d)[kElements]) const {
    float* rows = s.parts + part * (kBlock * kN) + column;
    MAMBA2_UNROLL
    for (int e = 0; e < kElements; e += 2)
      *reinterpret_cast<float2*>(rows + me.row((e >> 1) & 1) * kN + me.column(e / 4)) =
          float2{d[e], d[e + 1]};
  }
  // The tokens of a block and columns from `column` on of a (b, l, g, n) output, rounded. The chunk
  // is looked up anew: kept, it would cost registers.
  template <int kElements>
  MAMBA2_DEVICE void round(const StridedOut& out, int block, int column, const float* d) const {
    const Chunk chunk = args.chunking.at(task.i_chunk);
    const tile::Lane lane(ptx::anew(threadIdx.x));  // likewise
    const int first = block * kBlock;
    MAMBA2_NO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane.row(half);
      T* to = static_cast<T*>(out.ptr) + chunk.row * out.b + (chunk.token + row) * out.l +
              task.group * out.h + column + lane.column(0);
      MAMBA2_UNROLL
      for (int k = 0; k < kElements / 4; ++k) {
        const uint32_t pair =
            half ? pack2<T>(d[4 * k + 2], d[4 * k + 3]) : pack2<T>(d[4 * k], d[4 * k + 1]);
        if (row < chunk.count) *reinterpret_cast<uint32_t*>(to + 8 * k) = pair;
      }
    }
  }
  // The tokens of the i-th head of the task.
  MAMBA2_DEVICE const TokenStage<T>& wait_tokens(const TokenSlot<kN>& slot) const {
    ptx::mbarrier_wait(&s.tokens_ring.full[slot.stage], slot.phase);
    return s.tokens[slot.stage];
  }
  MAMBA2_DEVICE const StateStage<T, kN>& wait_states(int i) const {
    const StateSlot<kN> slot(i);
    ptx::mbarrier_wait(&s.states_ring.full[slot.stage], slot.phase);
    return s.states[slot.stage];
  }
  // dCB, summed over heads and rounded, transposed ([j][i]); no token is read by then.
  MAMBA2_DEVICE T* dCB_panel(int which) { return which ? s.tokens[0].dy[0] : s.tokens[0].x; }
  // What is lost of the own block's: a second word. It is multiplied once a group, and so costs
  // little; of pairs with the later block less is left where decay is not weak.
  MAMBA2_DEVICE T* dCB_rest() { return s.tokens[Shape::kTokenStages - 1].x; }
};

// d (64, kN) += A B with A in registers, in one word or two; returns when it is done.
template <class T, int kN, class BTile, class... Words>
MAMBA2_DEVICE void add_product(float (&d)[kN / 2], const BTile& b, const Words&... a) {
  ptx::wgmma_fence_operand(d);
  ptx::wgmma_fence();
  (tile::product_rs<T, kN, 4>(d, a, b, true), ...);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_fence_operand(d);
}

}  // namespace mamba2::ssd::sm90
