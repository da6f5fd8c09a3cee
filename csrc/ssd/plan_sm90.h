// The schedule of the sm_90a forward (fused_scan_sm90.cuh).
#pragma once
#include "plan.h"

namespace mamba2::ssd::sm90 {

// Plan::variant. Forced by bits 4..7 of the op schemas' plan.
constexpr int kTickets = 1, kSegments = 2, kPrefixes = 3;

// A unit is one head's block of 64 channels. A block of threads takes two of one group; with
// n = 256 one, whose state takes the registers of both scanners.
constexpr int units_per_block(int n) { return n > 128 ? 1 : 2; }

// The columns that a state has in registers and in carries: n < 64 is padded with zero columns of B
// and C, which TMA fills in.
constexpr int padded_n(int n) { return n < 64 ? 64 : n; }

// Whether this build has code for 9.0a, the only one in which this tier's kernels have bodies
// (MAMBA2_SM90A). A build for the CPU, asked about a card, answers as if it had.
bool is_built();

// How many runs a row has: of kPrefixes.
inline int runs_of(const Plan& plan) {
  int runs = 0;
  while (runs < kMaxRuns && plan.run_ends[runs] > 0) ++runs;
  return runs;
}

// Completes a plan of tier sm90: q, variant, segment_chunks, run_ends, reason.
void plan_forward(const Problem& problem, const Device& device, Plan* plan);

}  // namespace mamba2::ssd::sm90
