// chunk_scan_backward (sm_90a): dC of the later block's tokens, where one slice has all heads of a
// group. Either block of a chunk makes a part of it. Who comes first leaves its part in memory and
// goes on; who comes second adds it to its own, rounds the sum and stores it. The bits do not
// depend on who that is: a + b = b + a.
//
// Warps meet, each with 16 tokens: the state side's of the later block, and of the earlier block
// those of both token sides, each with half of the columns. Their accumulators have an element in
// the same place of the same lane. Who waits, waits for a warp that runs and only has to store.
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

template <class T, int kN>
struct Meeting {
  static constexpr int kHalf = kN / 4;  // elements of a lane: of half of the columns
  static constexpr int kLeft = 3;       // more than come: the first one's part lies in memory
  const ScanConsumer<T, kN>& me;

  MAMBA2_DEVICE int64_t place(int half) const {
    const int64_t group = int64_t(me.task.i_chunk) * me.args.g + me.task.group;
    return group * kTurns + 2 * me.me.warp + half;
  }
  MAMBA2_DEVICE float4* part(int half) const {
    return reinterpret_cast<float4*>(me.args.dC_later) + place(half) * (kHalf * 32 / 4) +
           ptx::laneid();
  }
  MAMBA2_DEVICE void leave(int half, const float* d) const {
    float4* to = part(half);
    MAMBA2_UNROLL
    for (int k = 0; k < kHalf; k += 4, to += 32) *to = float4{d[k], d[k + 1], d[k + 2], d[k + 3]};
  }
  MAMBA2_DEVICE void add(int half, float* d) const {
    const float4* from = part(half);
    MAMBA2_UNROLL
    for (int k = 0; k < kHalf; k += 4, from += 32) {
      const float4 v = *from;
      d[k] += v.x, d[k + 1] += v.y, d[k + 2] += v.z, d[k + 3] += v.w;
    }
  }
  // A lane has the turn of a half.
  MAMBA2_DEVICE int* turn(int first_half) const {
    return me.args.dC_turns + place(first_half) + ptx::laneid();
  }
  // Asks whether this warp comes first, with kHalves halves of the columns from first_half on. Soon
  // it has to come; what it does before hides how long the answer takes.
  template <int kHalves>
  MAMBA2_DEVICE int announce(int first_half) const {
    return ptx::laneid() < kHalves ? ptx::atom_add_relaxed_gpu(turn(first_half), 1) : 0;
  }
  // With this warp's part, `before` being the answer.
  template <int kHalves>
  MAMBA2_DEVICE void come(int first_half, float (&d)[kHalves * kHalf], int before) const {
    bool first[kHalves];
    MAMBA2_UNROLL
    for (int i = 0; i < kHalves; ++i) {
      first[i] = __shfl_sync(kAllLanes, before, i) == 0;
      if (first[i]) leave(first_half + i, d + i * kHalf);
    }
    __syncwarp();
    if (ptx::laneid() < kHalves && before == 0) tile::publish(turn(first_half), kLeft);
    MAMBA2_UNROLL
    for (int i = 0; i < kHalves; ++i) {
      if (first[i]) continue;
      tile::wait_published(me.args.dC_turns + place(first_half + i), kLeft);
      add(first_half + i, d + i * kHalf);
      me.template round<kHalf>(me.args.dC, 1, (first_half + i) * (kN / 2), d + i * kHalf);
    }
  }
};

}  // namespace mamba2::ssd::sm90
