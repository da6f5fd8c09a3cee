// chunk_scan_backward (sm_90a), the finishing side: K, and what the consumers leave of a head
// in shared memory on its way to global memory, while they do the next head. Of a ragged chunk it
// clears the rows that belong to a neighbour before the consumers see them.
//
//   K = 2^a_q <G, S>     dx     R_i - Q_i     E_i     F_j / delta_j     sum_{i>=j} V_ij     dD
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kSliced>
struct FinishingSide {
  using Shape = ScanShape<kN>;
  static constexpr int kThreads = 32 * kFinishWarps;
  static constexpr int kUnit = 8;                     // elements of 16 bytes
  static constexpr int kRowUnits = kHeadDim / kUnit;  // a thread keeps its columns
  static constexpr int kRowsAtOnce = kThreads / kRowUnits;
  // Heads that consumers begin before the one at hand is finished.
  static constexpr int kHeadsAhead = 2 / Shape::kSharers;
  const BackwardArgs& args;
  ChunkScanBackwardSmem<T, kN>& s;
  const ScanTask& task;
  const int warp;  // of this side

  // Asked for anew: what follows from a kept one would cost registers.
  MAMBA2_DEVICE int thread_anew() const { return 32 * warp + ptx::laneid(); }

  // ---- a ragged chunk ----
  // All threads have cleared what a barrier tells of. Each says so: compute-sanitizer takes the
  // arrival of one lane for a warp as that lane's alone.
  MAMBA2_DEVICE static void cleared(ptx::Mbarrier* full) {
    ptx::fence_proxy_async_shared();
    ptx::mbarrier_arrive(full);
  }
  MAMBA2_DEVICE void clear_group(int valid) const {
    ptx::mbarrier_wait(&s.group_loaded, 0);
    clear_own_rows<Shape, kN>(s.B, task.own_of(valid), thread_anew(), kThreads);
    clear_rows<kN>(s.C, task.own_of(valid), thread_anew(), kThreads);
    if (task.block == 0)
      clear_rows<kN>(s.later_C(), max(0, valid - kBlock), thread_anew(), kThreads);
    cleared(&s.group_full);
  }
  // The tokens of the i-th head.
  MAMBA2_DEVICE void clear_tokens(int valid, int i) const {
    const TokenSlot<kN> slot(i);
    TokenStage<T>& stage = s.tokens[slot.stage];
    ptx::mbarrier_wait(&s.tokens_loaded[slot.stage], slot.phase);
    clear_own_rows<Shape, kHeadDim>(stage.x, task.own_of(valid), thread_anew(), kThreads);
    clear_rows<kHeadDim>(stage.dy[0], task.own_of(valid), thread_anew(), kThreads);
    if (task.block == 0)
      clear_rows<kHeadDim>(stage.dy[1], max(0, valid - kBlock), thread_anew(), kThreads);
    cleared(&s.tokens_ring.full[slot.stage]);
  }
  // All that consumers may come to while the i-th head is finished, from head `next` on.
  MAMBA2_DEVICE void clear(int& next, int i) const {
    const int valid = task.valid(args);
    if (valid == kBackwardQ) return;
    if (next == 0) clear_group(valid);
    for (; next < min(task.heads, i + 1 + kHeadsAhead); ++next) clear_tokens(valid, next);
  }

  // <G, S> as the trace of G S^T: tensor cores take 16 by 16 elements of both at a time and add up
  // 16 rows by 16, of which the diagonal counts. The later block leaves it to the earlier one,
  // which has more to do besides.
  MAMBA2_DEVICE void multiply_states(const StateStage<T, kN>& states, float* K) {
    const int lane = ptx::laneid();
    tile::Lane rows(lane);
    float upper[4] = {}, lower[4] = {};  // 16 rows of G by the upper, the lower 8 rows of S
    constexpr int kParts = 8, kSteps = kN / 16, kPartRows = kSteps * (kHeadDim / 16) / kParts;
    MAMBA2_NO_UNROLL
    for (int part = warp; part < kParts; part += kFinishWarps) {
      const int step = part * kSteps / kParts;
      const int panel = step / 4 * kHeadDim * tile::kPanelColumns;
      MAMBA2_UNROLL
      for (int i = 0; i < kPartRows; ++i) {
        uint32_t g[4], h[4];
        rows.warp = part * kPartRows % (kHeadDim / 16) + i;
        tile::load_fragment(g, states.G + panel, step % 4, rows);
        tile::load_fragment(h, states.S + panel, step % 4, rows);
        ptx::mma_m16n8k16<T>(upper, g, h[0], h[2]);
        ptx::mma_m16n8k16<T>(lower, g, h[1], h[3]);
      }
    }
    const int past = lane / 4 - 2 * (lane % 4);  // row - column of this lane's first element
    float sum = past == 0 ? upper[0] + lower[2] : past == 1 ? upper[1] + lower[3] : 0;
    MAMBA2_UNROLL
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0) K[warp] = sum;
  }

  // By the copy engine, unless rows of the tile are a neighbour's.
  MAMBA2_DEVICE void store_dx(const HeadPlace& place, const T* dx) {
    if (task.ragged(args)) return store_dx_rows(place, dx);
    if (warp < kFinishWarps - 1 || !ptx::elect_sync()) return;
    ptx::tma_store_4d(&args.dx_tiles, place.channel, place.head,
                      task.chunk.token + task.block * kBlock, task.chunk.row, dx);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
  }
  MAMBA2_DEVICE void store_dx_rows(const HeadPlace& place, const T* dx) {
    const int thread = thread_anew();
    const int column = thread % kRowUnits * kUnit, first = thread / kRowUnits, rows = task.own();
    const int64_t token = task.chunk.token + task.block * kBlock + first;
    T* out = static_cast<T*>(args.dx.ptr) + task.chunk.row * args.dx.b + token * args.dx.l +
             place.head * args.dx.h + place.channel + column;
    if (place.channel + column >= args.p) return;
    MAMBA2_UNROLL
    for (int pass = 0; pass < ceil_div(kBlock, kRowsAtOnce); ++pass) {
      const int row = first + pass * kRowsAtOnce;
      if (row < rows)
        *reinterpret_cast<uint4*>(out) =
            *static_cast<const uint4*>(tile::panel_address(dx, row, column));
      out += kRowsAtOnce * args.dx.l;
    }
  }

  MAMBA2_DEVICE void store_token_sums(const HeadResults& results, int64_t index, int i) {
    const float (&R)[4][kBlock] = results.R[kOwn];
    const bool earlier = task.block == 0;
    const int64_t own = index * kBackwardQ + task.block * kBlock + i;
    const bool shared = Shape::kSharers == 2;
    const float V = shared ? results.V[0][i] + results.V[1][i] : results.V[0][i];
    const float row = R[0][i] + R[1][i] + R[2][i] + R[3][i] - V * results.delta[i];
    args.columns[own] = V + s.BC_diagonal[i] * results.dy_x[i];
    args.to_state[own] = shared ? results.F[0][i] + results.F[1][i] : results.F[0][i];
    args.rows_out[own] = row + results.E[i];
    const bool by_sweeps =
        args.K_by_forward_sweep(task.chunk) || args.K_by_reverse_sweep(task.chunk);
    if (earlier && i == 0 && !by_sweeps)
      args.through[index] = (results.K[0] + results.K[1] + results.K[2]) * results.through;
  }
  MAMBA2_DEVICE void store_other_sums(const HeadResults& results, int64_t index, int head, int i) {
    const float (&R)[4][kBlock] = results.R[kLater];
    const float (&dD)[4][kHeadDim] = results.dD;
    if (task.block == 0)
      args.later_rows[index * args.later_apart + i] = R[0][i] + R[1][i] + R[2][i] + R[3][i];
    if (args.D_per_channel) {
      float* out = args.dD_channels[task.block] + index * args.dD_apart[task.block];
      out[i] = dD[0][i] + dD[1][i] + dD[2][i] + dD[3][i];
      return;
    }
    if (i % kDRun > 0) return;
    const float4* dy_x = reinterpret_cast<const float4*>(results.dy_x + i);
    const float4 u = dy_x[0], v = dy_x[1];
    const int block = task.i_chunk * 2 + task.block;
    float* out = args.dD_blocks + int64_t(block * args.h + head) * kDParts;
    out[i / kDRun] = ((u.x + u.y) + (u.z + u.w)) + ((v.x + v.y) + (v.z + v.w));
  }

  MAMBA2_DEVICE void run() {
    const int lane = ptx::laneid();
    HeadPlace place(args, task.first_head);
    int cleared_heads = 0;
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i, place.advance(args)) {
      clear(cleared_heads, i);
      const ResultSlot<kN> slot(i);
      HeadResults& results = s.results[slot.stage];
      const int head = task.first_head + i;
      const int64_t index = task.at(args, head);
      if (task.block == 0) {
        const StateSlot<kN> state(i);
        ptx::mbarrier_wait(&s.states_ring.full[state.stage], state.phase);
        multiply_states(s.states[state.stage], results.K);
        arrive_warp(&s.states_ring.empty[state.stage], lane);
        if (lane == 0) ptx::mbarrier_arrive(&s.results_ring.full[slot.stage]);  // K's parts too
      }
      ptx::mbarrier_wait(&s.results_ring.full[slot.stage], slot.phase);
      if (args.completes_dx()) store_dx(place, s.dx[i % Shape::kDxTiles]);
      arrive_warp(&s.dx_empty[i % Shape::kDxTiles], lane);
      if (warp < kBlock / 32) {
        store_token_sums(results, index, thread_anew());
      } else {
        // By now all are done with the states of the heads before.
        if (kSliced && i > 0 && i == args.shared_images && lane == 0)
          tile::publish(images_read(args, task.pair, task.group, task.block), 1);
        MAMBA2_NO_UNROLL
        for (int k = 0; k < kBlock; k += 32)
          store_other_sums(results, index, head, k + ptx::laneid());
      }
      arrive_warp(&s.results_ring.empty[slot.stage], lane);
    }
  }
};

}  // namespace mamba2::ssd::sm90
