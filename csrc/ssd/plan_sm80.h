// How tier sm80 cuts its work.
#pragma once
#include "plan.h"

namespace mamba2::ssd::sm80 {

// Bits of Plan::variant. Forced by bits 4..7 of the op schemas' plan.
constexpr int kSmallSmem = 1;      // no more shared memory than the small cards have
constexpr int kShortSegments = 2;  // sequences in segments of two chunks, whatever the card

// Completes a plan of tier sm80, the same for both directions: segment_chunks.
void plan_segments(const Problem& problem, const Device& device, Plan* plan);

// Backward: in how many splits the heads of a group are summed over, each by a block a chunk that
// leaves its sums of dB, dC and dCB in memory. No split is empty.
int plan_head_splits(const Problem& problem, const Device& device, const Plan& plan);

}  // namespace mamba2::ssd::sm80
