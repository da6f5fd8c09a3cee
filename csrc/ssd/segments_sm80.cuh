// What the sweeps over chunks and segments of them share (Segments in launch.h).
#pragma once
#include "formulas.cuh"
#include "launch.h"

namespace mamba2::ssd::sm80 {

// Whether a chunk of this decay leaves the state so much as it was that the next chunk's would be
// rounded alike: 1 / 64 is 2 to 4 steps of bf16.
MAMBA2_DEVICE bool lets_stay(float decay) { return decay > 1.f - 1.f / 64; }

// The state that a segment leaves, counted from zero, depends on its last chunks alone when those
// forget all that was before: 2^-160 is 0 in fp32. (Backward: the gradient, on its first chunks.)
// Returns how many they are, at most `count`. For a whole warp; `first` and `count` are the
// segment's chunks.
MAMBA2_DEVICE int remembered_chunks(const float* a_cumsum_log2, int first, int count, int h,
                                    int i_h, bool reverse) {
  const int lane = threadIdx.x % 32;
  float before = 0.f;
  for (int k0 = 0; k0 < count; k0 += 32) {
    const int k = k0 + lane, i = reverse ? k : count - 1 - k;  // k chunks from the end of the walk
    float sum = 0.f;
    if (k < count) {
      const int64_t head = int64_t(first + i) * h + i_h;
      sum = a_cumsum_log2[head * kChunkTokens + kChunkTokens - 1];
    }
    MAMBA2_UNROLL for (int step = 1; step < 32; step *= 2) {
      const float nearer = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += nearer;
    }
    sum += before;
    const bool forgets = k < count && sum <= float(kMinDecayLog2);
    if (const unsigned lanes = __ballot_sync(~0u, forgets)) return k0 + __ffs(lanes);
    before = __shfl_sync(~0u, sum, 31);
  }
  return count;
}

}  // namespace mamba2::ssd::sm80
