// chunk_scan_backward (sm_90a): all gradients that one chunk of q = 128 tokens can give, from the
// state S that enters it and the gradient G of the state that leaves it.
//
//   dx_j = delta_j [2^(a_q - a_j) G B_j + sum_{i>=j} L_ij (C_i.B_j) dy_i] + D dy_j
//   dB_j = sum over heads: delta_j [2^(a_q - a_j) G^T x_j + sum_{i>=j} L_ij (dy_i.x_j) C_i]
//   dC_i = sum over heads: 2^a_i S^T dy_i + sum_{j<=i} L_ij delta_j (dy_i.x_j) B_j
//   V_ij = L_ij (C_i.B_j) (dy_i.x_j): row sums R, column sums Q and, diagonal included, the direct
//          part of d delta; E_i = 2^a_i dy_i.(S C_i), F_j, K = 2^a_q <G, S>, dD
//
// grid: chunks and slices of a group's heads, groups, and 2 blocks of 64 tokens. A block of threads
//   owns 64 tokens, loops over its heads and keeps dB, dC and dCB, summed over heads, in registers.
//   Its tokens are the j of all pairs (i, j): the earlier block also does the pairs with the later
//   one. What they give to the later tokens' R goes to later_rows, to their dC to dC_later, where
//   the chunk's two blocks meet, or, of several slices, with these' other parts to where group_sum
//   finds it (slices_backward_sm90.cuh; the kernel has an instance for either). Earlier blocks take
//   longer: they begin first, so that the card ends with short ones. But of many chunks or slices,
//   only the last do so: the others have their blocks side by side, and one finds S and G in the
//   L2.
//   Where all sweeps are on the card at once, a block waits for the states of its own chunk, head
//   by head, while they still run; of long sequences it then begins in the middle (from_middle).
// Warpgroups: the state side (products with S and G: dC, dB, E, dD); two token sides (products of
//   tokens, transposed: rows are j), which share out columns i and channels of each head, or, at
//   n = 64, the heads: dx, dCB, R, Q, F; a warp that loads and three that finish: K, and dx and all
//   sums to memory. C B^T is computed once, in fp32; dCB meets B and C once, after the last head,
//   the own block's in two words (n = 64: in one). Pairs that a reset parts are cut out of both, by
//   kernels of their own, so that problems without resets pay nothing for it.
// Shared memory: 3 or 4 stages x (x, dy of two blocks) + 2 or 3 stages x (S, G) + B, C + C B^T of
//   the later block + m of two exchanges, or C B^T of the own block + dx: 224 KB. Stages and
//   registers: ScanShape.
// Bound by the chain of the token sides; the floor is HBM's (80 KB a chunk and head).
// Not supported: n other than 64 and 128.
#include "../core/launch.h"
#include "chunk_scan_backward_finish_sm90.cuh"
#include "chunk_scan_backward_state_sm90.cuh"
#include "chunk_scan_backward_tokens_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace {

// A panel of own tokens that may be folded: load(to, map, token) loads a box. `whole` is the map of
// boxes of 64 tokens, `eights` that of 8.
template <class Shape, class T, class Load>
MAMBA2_DEVICE void load_own(T* panel, const ptx::TensorMap* whole, const ptx::TensorMap* eights,
                            Load&& load) {
  if (!Shape::kFolded) return load(panel, whole, 0);
  MAMBA2_NO_UNROLL
  for (int warp = 0; warp < kSideWarps; ++warp) {
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half)
      load(panel + (2 * warp + half) * 8 * tile::kPanelColumns, eights,
           8 * own_eight<Shape>(warp, half));
  }
}

template <class T, int kN, bool kSliced>
MAMBA2_DEVICE void produce(const BackwardArgs& args, ChunkScanBackwardSmem<T, kN>& s,
                           const ScanTask& task) {
  const Chunk& chunk = task.chunk;
  const bool earlier = task.block == 0;
  const int own = chunk.token + task.block * kBlock, later = chunk.token + kBlock;
  constexpr uint32_t kGroupTile = sizeof(T) * kBlock * kN, kTile = sizeof(T) * kBlock * kHeadDim;
  constexpr uint32_t kImage = sizeof(T) * kHeadDim * kN;

  const bool ragged = task.ragged(args);
  ptx::Mbarrier* group_loaded = ragged ? &s.group_loaded : &s.group_full;
  ptx::Mbarrier* tokens_loaded = ragged ? s.tokens_loaded : s.tokens_ring.full;
  ptx::mbarrier_arrive_expect_tx(group_loaded, (2 + earlier) * kGroupTile);
  for (int panel = 0; panel < kN / 64; ++panel) {
    const int at = panel * kBlock * 64, column = panel * 64;
    load_own<ScanShape<kN>>(
        s.B + at, &args.B, &args.B_eights, [&](T* to, const ptx::TensorMap* map, int token) {
          ptx::tma_load_4d(to, map, column, task.group, own + token, chunk.row, group_loaded);
        });
    ptx::tma_load_4d(s.C + at, &args.C, column, task.group, own, chunk.row, group_loaded);
    if (earlier)
      ptx::tma_load_4d(s.later_C() + at, &args.C, column, task.group, later, chunk.row,
                       group_loaded);
  }

  // B, C and the table of chunks were there before. What chunk_cumsum has left was complete when a
  // sweep that counts began.
  if (!args.progress) ptx::griddepcontrol_wait();
  constexpr uint32_t kDRow = sizeof(float) * kHeadDim;
  // In the earlier half of decays may lie what the earlier block has left of a head.
  const int first = earlier ? 0 : kBlock;
  const uint32_t scalar_bytes = sizeof(float) * (kBackwardQ - first);
  const uint32_t bytes = (2 + earlier) * kTile + 3 * scalar_bytes + kDRow;
  HeadPlace place(args, task.first_head);
  for (int i = 0; i < task.heads; ++i, place.advance(args)) {
    const int head = task.first_head + i;
    const int64_t index = task.at(args, head);
    const int64_t scalars = int64_t(task.i_chunk * args.tensor_h + place.head) * kBackwardQ + first;

    // Looked up for each head: kept, it would cost registers. The consumers are at earlier heads.
    if (args.progress) SweepsBefore(args, task).wait(i);
    const TokenSlot<kN> slot(i);
    TokenStage<T>& stage = s.tokens[slot.stage];
    ptx::Mbarrier* full = &tokens_loaded[slot.stage];
    ptx::mbarrier_wait(&s.tokens_ring.empty[slot.stage], slot.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    load_own<ScanShape<kN>>(
        stage.x, &args.x, &args.x_eights, [&](T* to, const ptx::TensorMap* map, int token) {
          ptx::tma_load_4d_once(to, map, place.channel, place.head, own + token, chunk.row, full);
        });
    ptx::tma_load_4d_once(stage.dy[0], &args.dy, place.channel, place.head, own, chunk.row, full);
    if (earlier)  // of these both blocks have need
      ptx::tma_load_4d(stage.dy[1], &args.dy, place.channel, place.head, later, chunk.row, full);
    ptx::bulk_load(stage.a_log2 + first, args.a_cumsum_log2 + scalars, scalar_bytes, full);
    ptx::bulk_load(stage.a_run_log2 + first, args.a_run_log2 + scalars, scalar_bytes, full);
    ptx::bulk_load(stage.delta + first, args.delta + scalars, scalar_bytes, full);
    ptx::bulk_load(stage.D, args.D_rows + head * kHeadDim, kDRow, full);

    const StateSlot<kN> state(i);
    StateStage<T, kN>& states = s.states[state.stage];
    full = &s.states_ring.full[state.stage];
    ptx::mbarrier_wait(&s.states_ring.empty[state.stage], state.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, 2 * kImage);
    ptx::bulk_load(states.G, static_cast<const T*>(args.d_states) + index * (kHeadDim * kN), kImage,
                   full);
    ptx::bulk_load(states.S, static_cast<const T*>(args.states) + index * (kHeadDim * kN), kImage,
                   full);
  }
  if (earlier) {
    const StateSlot<kN> state(task.heads);
    ptx::mbarrier_wait(&s.states_ring.empty[state.stage], state.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(&s.states_ring.full[state.stage], kGroupTile);
    for (int panel = 0; panel < kN / 64; ++panel)
      ptx::tma_load_4d(s.later_C_again(task.heads) + panel * kBlock * 64, &args.C, panel * 64,
                       task.group, later, chunk.row, &s.states_ring.full[state.stage]);
  }
  if (!kSliced) return;
  s.parts = parts_of(args, task.pair, task.group, earlier);
  wait_images(args, task.pair, task.group, task.block);
  ptx::mbarrier_arrive(&s.dCB_full);
}

// Where the run of each token begins. For one warp, which says so as who loads B and C does.
template <class T, int kN>
MAMBA2_DEVICE void find_runs(const BackwardArgs& args, ChunkScanBackwardSmem<T, kN>& s,
                             const ScanTask& task) {
  const int lane = threadIdx.x % 32, first = task.block * kBlock;
  const int last = min(kBackwardQ, task.chunk.count);
  bool reset[2 * kBlock / 32];
  MAMBA2_UNROLL
  for (int k = 0; k < 2 * kBlock / 32; ++k) {
    const int token = first + 32 * k + lane;
    reset[k] = token < last &&
               resets(args.seq_idx, args.chunking.l, task.chunk.row, task.chunk.token + token);
  }
  int before = 0;
  MAMBA2_UNROLL
  for (int k = 0; k < 2 * kBlock / 32; ++k) {
    const unsigned all = __ballot_sync(kAllLanes, reset[k]), up_to = all & ~0u >> (31 - lane);
    s.run_first[32 * k + lane] = up_to ? 32 * k + 31 - __clz(up_to) : before;
    if (all) before = 32 * k + 31 - __clz(all);
  }
  ptx::mbarrier_arrive(&s.group_full);
}

template <class T, int kN, bool kSliced, bool kResets>
__global__ void MAMBA2_LAUNCH_BOUNDS(kScanThreads, 1)
    chunk_scan_backward_kernel(const MAMBA2_GRID_CONSTANT BackwardArgs args) {
#if MAMBA2_SM90A
  using Shape = ScanShape<kN>;
  auto& s = *static_cast<ChunkScanBackwardSmem<T, kN>*>(ptx::dynamic_smem());
  ptx::griddepcontrol_launch_dependents();
  const ScanTask task(args, kSliced);
  if (task.chunk.i_seq < 0) return ptx::griddepcontrol_wait();
  if (threadIdx.x == 0) {
    const int loaders = task.ragged(args) ? 32 * kFinishWarps : 1;
    s.tokens_ring.init(loaders, kWarpArrivals * Shape::kHeadWarps);
    const int earlier_finish = task.block == 0 ? kFinishWarps : 0;
    s.states_ring.init(1, kWarpArrivals * (Shape::kHeadWarps + earlier_finish));
    s.results_ring.init(32 * Shape::kHeadWarps + earlier_finish, kWarpArrivals * kFinishWarps);
    for (ptx::Mbarrier& b : s.dx_empty) ptx::mbarrier_init(&b, kWarpArrivals * kFinishWarps);
    ptx::mbarrier_init(&s.group_full, loaders + (kResets ? 32 : 0));
    ptx::mbarrier_init(&s.group_loaded, 1);
    for (ptx::Mbarrier& b : s.tokens_loaded) ptx::mbarrier_init(&b, 1);
    ptx::mbarrier_init(&s.tokens_done, kScanConsumers);
    ptx::mbarrier_init(&s.dCB_full, kScanConsumers + kSliced);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = tile::uniform(threadIdx.x / 32);
  if (warp >= kConsumerWarps) {
    ptx::setmaxnreg_dec<Shape::kOthers>();
    if (kResets && warp == kConsumerWarps + 1) find_runs(args, s, task);
    if (warp > kConsumerWarps)
      FinishingSide<T, kN, kSliced>{args, s, task, warp - kConsumerWarps - 1}.run();
    else if (ptx::elect_sync())
      produce<T, kN, kSliced>(args, s, task);
  } else if (warp < kSideWarps) {
    ptx::setmaxnreg_inc<Shape::kState>();
    StateSide<T, kN, kSliced>(args, s, task).run();
  } else {
    ptx::setmaxnreg_inc<Shape::kTokens>();
    TokenSide<T, kN, kSliced, kResets>(args, s, task).run();
  }
  // Blocks that wait for sweeps do not wait for all of their kernel; so one does, lest this kernel
  // be over before.
  if (args.progress && task.ends_grid()) ptx::griddepcontrol_wait();
#endif
}

}  // namespace

int chunk_scan_backward(const BackwardArgs& args, DType dtype, void* stream) {
  const Range range("chunk_scan_backward");
  return dispatch_backward(dtype, args.n, [&](auto element, auto n) {
    using T = decltype(element);
    using Smem = ChunkScanBackwardSmem<T, n()>;
    static_assert(sizeof(Smem) <= 227 * 1024, "shared memory of one block");
    const unsigned along = args.unpaired_pairs == args.pairs() ? 1 : 2;
    const LaunchShape at{dim3(along * args.pairs(), args.g, 2 / along), kScanThreads, sizeof(Smem),
                         true, BlockTile{kBlock, kHeadDim, n(), ScanShape<n()>::kTokenStages}};
    const auto run = [&](auto sliced, auto resets) {
      return launch(chunk_scan_backward_kernel<T, n(), sliced(), resets()>, at, stream, args);
    };
    const auto with_resets = [&](auto sliced) {
      return args.seq_idx ? run(sliced, std::true_type{}) : run(sliced, std::false_type{});
    };
    return args.single_slice() ? with_resets(std::false_type{}) : with_resets(std::true_type{});
  });
}

}  // namespace mamba2::ssd::sm90
