// The last stage of the tensor-core backward: gradients of the step size become d_dt, and the sums
// over all chunks become dA, d_dt_bias and dD. The host side of delta_backward.cu.
#pragma once
#include "chunks.cuh"
#include "params.h"

namespace mamba2::ssd {

// What the earlier stages leave for it, token by token and head by head, in fp32. An array
// (chunks, h, q) may hold anything beyond a chunk's count. q is 32, 64, 128 or 256.
// Parts are added in their order: a stage that cuts the state into slices leaves one part a slice;
// one that cuts heads leaves head_parts heads, one after another, where there is one in delta; of
// several passes each leaves all arrays but delta, (passes, chunks, h, q).
struct DeltaGradientParts {
  const float* delta = nullptr;    // (chunks, h, q)
  const float* rows = nullptr;     // (chunks, h, q)         R_i - Q_i, diagonal left out
  const float* columns = nullptr;  // (chunks, h, q)         sum_{i>=j} V_ij, diagonal included
  // (from_state_parts, chunks, h, from_state_apart)  E_i, or more of R_i
  const float* from_state = nullptr;
  int from_state_first = 0;         // token of a chunk; those before it have none
  int from_state_apart = 0;         // q, or less
  const float* to_state = nullptr;  // (chunks, h, q)  F_j / delta_j
  const float* through = nullptr;   // (through_parts, chunks, h)   K = 2^s_q <G, S>
  int from_state_parts = 1, through_parts = 1, head_parts = 1, passes = 1;
  const float* dD = nullptr;  // (chunks, dD_width)     sum_t dy_t x_t of the chunk, optional
  int dD_width = 0;           // h, or h p
  bool programmatic = false;  // launches begin while the kernel before them ends (sm_90)
};

// Workspace: two fp32 arrays (chunks, h).
std::size_t delta_backward_workspace_bytes(int64_t chunks, int h);

// For every token of every chunk (t numbers the tokens of the chunk):
//   d(delta_t A) = sum_{i>=t} (R_i + E_i - Q_i) + sum_{j<t} F_j + K + d_log_decay
//   d delta_t    = F_t / delta_t + sum_{i>=t} V_it + A d(delta_t A)
//   d_dt         = d delta_t * slope
// and dA = sum_t delta_t d(delta_t A), d_dt_bias = sum d_dt, dD = sum over chunks of its parts.
// Fixed order of every sum. `chunks` is the number of chunks of the arrays.
// Writes p.d_dt (tokens of chunks only), and to the workspace the chunks' parts of dA and
// d_dt_bias. Lets the next kernel begin when those before this one are complete.
int delta_gradients(const BackwardParams& p, const DeltaGradientParts& parts,
                    const Chunking& chunking, int64_t chunks, void* workspace, void* stream);
// Writes p.dA, p.d_dt_bias and p.dD where they are wanted.
int sum_chunks(const BackwardParams& p, const DeltaGradientParts& parts, int64_t chunks,
               const void* workspace, void* stream);

}  // namespace mamba2::ssd
