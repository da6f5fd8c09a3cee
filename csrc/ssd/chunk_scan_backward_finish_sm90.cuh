// chunk_scan_backward (sm_90a), the finishing side: what the two consumers leave of a head in
// shared memory becomes dx and the sums in global memory, while they do the next head.
//
//   dx_j = delta_j dx'_j + D dy_j     R_i - Q_i, E_i, F_j / delta_j, sum_{i>=j} V_ij, K, dD
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kEarlier>
struct FinishingSide {
  static constexpr int kThreads = 32 * kFinishWarps;
  static constexpr int kColumns = 4;                                  // of dx, a thread
  static constexpr int kRowsAtOnce = kThreads * kColumns / kHeadDim;  // a thread keeps its columns
  static constexpr int kUnrolled = 3;
  const BackwardArgs& args;
  ChunkScanBackwardSmem<T, kN>& s;
  const ScanTask& task;
  const int warp;  // of this side

  // Asked for anew: what follows from a kept one would cost registers.
  MAMBA2_DEVICE int thread_anew() const { return 32 * warp + ptx::laneid(); }

  MAMBA2_DEVICE void store_dx(const TokenStage<T>& stage, int head) {
    const int thread = thread_anew();
    const int column = thread % (kHeadDim / kColumns) * kColumns;
    const int first = thread / (kHeadDim / kColumns), rows = task.own();
    const float* delta = stage.delta + task.block * kBlock;
    const float4 D = *reinterpret_cast<const float4*>(stage.D + column);
    const int64_t token = task.chunk.token + task.block * kBlock + first;
    T* out = static_cast<T*>(args.dx.ptr) + task.chunk.row * args.dx.b + token * args.dx.l +
             head * args.dx.h + column;
    MAMBA2_NO_UNROLL
    for (int base = first; base < rows; base += kUnrolled * kRowsAtOnce) {
      MAMBA2_UNROLL
      for (int k = 0; k < kUnrolled; ++k, out += kRowsAtOnce * args.dx.l) {
        const int row = base + k * kRowsAtOnce;
        if (row >= rows) continue;
        const float4 v = *reinterpret_cast<const float4*>(&s.dx[row][column]);
        const uint2 dy = *static_cast<const uint2*>(tile::panel_address(stage.dy[0], row, column));
        const float2 dy0 = unpack2<T>(dy.x), dy1 = unpack2<T>(dy.y);
        const float d = delta[row];
        *reinterpret_cast<uint2*>(out) =
            uint2{pack2<T>(v.x * d + D.x * dy0.x, v.y * d + D.y * dy0.y),
                  pack2<T>(v.z * d + D.z * dy1.x, v.w * d + D.w * dy1.y)};
      }
    }
  }

  MAMBA2_DEVICE void store_token_sums(const TokenStage<T>& stage, const HeadSums& sums,
                                      int64_t index, int i) {
    const float (&R)[4][kBlock] = sums.R[0];
    const int64_t own = index * kBackwardQ + task.block * kBlock + i;
    const float Q = sums.V[i] * stage.delta[task.block * kBlock + i];
    const float row = R[0][i] + R[1][i] + R[2][i] + R[3][i] - Q;
    args.columns[own] = sums.V[i] + sums.diagonal[i];
    args.to_state[own] = sums.F[i];
    args.rows_out[own] = kEarlier ? row : row + sums.E[i];
    if (kEarlier) args.later_rows[own] = sums.E[i];
    // (state_sweeps has written that of a last chunk)
    if (kEarlier && i == 0 && !(task.chunk.is_last && args.d_final_states))
      args.through[index] = sums.K[0] + sums.K[1] + sums.K[2] + sums.K[3];
  }
  MAMBA2_DEVICE void store_other_sums(const HeadSums& sums, int64_t index, int head, int i) {
    const float (&R)[4][kBlock] = sums.R[1];
    if (kEarlier)
      args.later_rows[index * kBackwardQ + kBlock + i] = R[0][i] + R[1][i] + R[2][i] + R[3][i];
    const float dD = args.D_per_channel
                         ? sums.dD[0][i] + sums.dD[1][i] + sums.dD[2][i] + sums.dD[3][i]
                         : sums.dy_x[i];
    const int64_t block = int64_t(task.i_chunk) * 2 + task.block;
    args.dD_blocks[(block * args.h + head) * kHeadDim + i] = dD;
  }

  MAMBA2_DEVICE void run() {
    const int lane = ptx::laneid();
    MAMBA2_NO_UNROLL
    for (int i = 0; i < task.heads; ++i) {
      const TokenStage<T>& stage = s.tokens[stage_of(i)];
      const HeadSums& sums = s.sums[stage_of(i)];
      const int head = task.first_head + i;
      const int64_t index = args.head_at(task.i_chunk, head);
      ptx::mbarrier_wait(&s.tokens_ring.full[stage_of(i)], phase_of(i));
      ptx::mbarrier_wait(&s.head_done[stage_of(i)], phase_of(i));
      store_dx(stage, head);
      arrive_warp(&s.dx_read, lane);
      MAMBA2_NO_UNROLL
      for (int k = thread_anew(); k < 2 * kBlock; k += kThreads) {
        if (k < kBlock)
          store_token_sums(stage, sums, index, k);
        else
          store_other_sums(sums, index, head, k - kBlock);
      }
      arrive_warp(&s.tokens_ring.empty[stage_of(i)], lane);
    }
  }
};

}  // namespace mamba2::ssd::sm90
