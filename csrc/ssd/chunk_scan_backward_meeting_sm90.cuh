// chunk_scan_backward (sm_90a): dC of the later block's tokens, where one slice has all heads of a
// group. Either block of a chunk makes a part of it. Who comes first leaves its part in memory and
// goes on; who comes second adds it to its own, rounds the sum and stores it. The bits do not
// depend on who that is: a + b = b + a.
//
// Warps meet, each with 16 tokens: the state side's of the later block, and of the earlier block
// those of both token sides, each with half of the columns. Their accumulators have an element in
// the same place of the same lane. Who waits, waits for a warp that runs and has only to finish.
#pragma once
#include "chunk_scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {

// A warp's part, kHalves halves of the columns.
template <class T, int kN, int kHalves>
struct Meeting {
  static constexpr int kHalf = kN / 4;  // elements of a lane: of half of the columns
  static constexpr int kLeft = 3;       // more than come: the first one's part lies in memory
  const ScanConsumer<T, kN>& me;
  const int first_half;
  int before = 0;                   // lane i: how many came before this warp with the i-th half
  float4 part[kHalves][kHalf / 4];  // the first one's

  // Announces this warp, which then has to come soon.
  MAMBA2_DEVICE Meeting(const ScanConsumer<T, kN>& me, int first_half, bool comes)
      : me(me), first_half(first_half) {
    if (comes && ptx::laneid() < kHalves)
      before = ptx::atom_add_acquire_gpu(turn(ptx::laneid()), 1);
    __syncwarp();
  }
  MAMBA2_DEVICE int64_t place(int i) const {
    const int64_t group = int64_t(me.task.i_chunk) * me.args.g + me.task.group;
    return group * kTurns + 2 * me.me.warp + first_half + i;
  }
  MAMBA2_DEVICE int* turn(int i) const { return me.args.turns + place(i); }
  MAMBA2_DEVICE float4* memory(int i) const {
    return reinterpret_cast<float4*>(me.args.dC_later) + place(i) * (kHalf * 32 / 4) +
           ptx::laneid();
  }
  MAMBA2_DEVICE int came(int i) const { return __shfl_sync(kAllLanes, before, i); }
  MAMBA2_DEVICE void load(int i) {
    const float4* from = memory(i);
    MAMBA2_UNROLL
    for (int k = 0; k < kHalf / 4; ++k) part[i][k] = from[32 * k];
  }
  // Has what is there on its way before it is asked for.
  MAMBA2_DEVICE void look() {
    MAMBA2_UNROLL
    for (int i = 0; i < kHalves; ++i)
      if (came(i) >= kLeft) load(i);
  }
  MAMBA2_DEVICE void come(float (&d)[kHalves * kHalf]) {
    MAMBA2_UNROLL
    for (int i = 0; i < kHalves; ++i) {
      if (came(i) > 0) continue;
      float4* to = memory(i);
      MAMBA2_UNROLL
      for (int k = 0; k < kHalf / 4; ++k) {
        const float* v = d + i * kHalf + 4 * k;
        to[32 * k] = float4{v[0], v[1], v[2], v[3]};
      }
    }
    __syncwarp();
    if (ptx::laneid() < kHalves && before == 0) tile::publish(turn(ptx::laneid()), kLeft);
    MAMBA2_UNROLL
    for (int i = 0; i < kHalves; ++i) {
      if (came(i) == 0) continue;
      if (came(i) < kLeft) {
        tile::wait_published(turn(i), kLeft);
        load(i);
      }
      float* v = d + i * kHalf;
      MAMBA2_UNROLL
      for (int k = 0; k < kHalf / 4; ++k) {
        v[4 * k] += part[i][k].x, v[4 * k + 1] += part[i][k].y;
        v[4 * k + 2] += part[i][k].z, v[4 * k + 3] += part[i][k].w;
      }
      me.template round<kHalf>(me.args.dC, 1, (first_half + i) * (kN / 2), v);
    }
  }
};

}  // namespace mamba2::ssd::sm90
