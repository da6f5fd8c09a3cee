// The stages of tier any, in the order of the equation. Each returns a cudaError_t as int.
// U below is fp32, and fp64 when the tensors are.
#pragma once
#include "chunks.cuh"
#include "params.h"

namespace mamba2::ssd::any {

// What each stage knows of the problem: chunks are found through `chunking`, and `chunks` bounds
// their number.
struct Work {
  Inputs in;
  Chunking chunking;
  int64_t chunks = 0;
};

struct ChunkStateParams {
  Work work;
  Strided dy;              // (b, l, h, p) T          the gradient's form only
  void* states = nullptr;  // (chunks, h, p, n) U out
  void* decay = nullptr;   // (chunks, h) U out       product of the chunk's decays
};
// states = sum_j delta_j (decay after j) x_j B_j^T
int chunk_state(const ChunkStateParams&, void* stream);
// states = sum_i (decay up to i) dy_i C_i^T
int chunk_state_gradient(const ChunkStateParams&, void* stream);

struct StatePassingParams {
  Work work;
  void* states = nullptr;       // (chunks, h, p, n) U    in: what chunks add; out: what meets them
  const void* decay = nullptr;  // (chunks, h) U
  AnyFloat from;                // (nseq, h, p, n)        before the first step, optional
  void* to = nullptr;           // (nseq, h, p, n) U out  after the last step, optional
};
// Forward: `from` initial states, `to` final states; states become those entering the chunks.
int state_passing(const StatePassingParams&, void* stream);
// Backward: `from` gradients of final states; states become gradients of those leaving the chunks.
int state_passing_gradient(const StatePassingParams&, void* stream);

struct ChunkScanParams {
  Work work;
  const void* states = nullptr;  // (chunks, h, p, n) U   entering the chunks
  StridedOut y;                  // (b, l, h, p) T out    or dz in the gradient's form
  Strided dy;                    // (b, l, h, p) T        the gradient's form only
};
int chunk_scan(const ChunkScanParams&, void* stream);
// dz = dy y' silu'(z), y' the output before the gate.
int chunk_scan_gate_gradient(const ChunkScanParams&, void* stream);

struct ChunkScanGradientParams {
  Work work;
  Strided dy;                         // (b, l, h, p) T
  const void* states = nullptr;       // (chunks, h, p, n) U   entering the chunks
  const void* d_states = nullptr;     // (chunks, h, p, n) U   gradients of the states leaving them
  const void* d_log_decay = nullptr;  // (nseq, h) U       optional
  StridedOut dx, d_dt, dB, dC;
  void* dA = nullptr;         // (chunks, h) U out    partial sums
  void* d_dt_bias = nullptr;  // (chunks, h) U out
  void* dD = nullptr;         // (chunks, h, p) U out, optional
  int slices = 1;             // of a group's heads; several: sums of dB and dC of each slice
  void *dB_slices = nullptr, *dC_slices = nullptr;  // (slices, chunks, g, q, n) U out
};
// dx, d_dt and the chunks' parts of dA, d_dt_bias, dD.
int chunk_scan_gradient_x(const ChunkScanGradientParams&, void* stream);
// dB and dC, summed over the heads of a group, or over those of its slices.
int chunk_scan_gradient_BC(const ChunkScanGradientParams&, void* stream);
// dB and dC from the sums of the slices.
int sum_over_slices(const ChunkScanGradientParams&, void* stream);

struct SumOverChunksParams {
  int64_t chunks = 0;
  int h = 0, p = 0;
  DType dtype = DType::f32;  // of U
  bool dD_per_channel = false;
  const void *dA_parts = nullptr, *d_dt_bias_parts = nullptr, *dD_parts = nullptr;
  void *dA = nullptr, *d_dt_bias = nullptr;  // (h) U out, d_dt_bias optional
  void* dD = nullptr;                        // (h) or (h, p) U out, optional
};
int sum_over_chunks(const SumOverChunksParams&, void* stream);

// log_decay (b, h) U = sum_t delta_t A, of rows that are one segment each. For every tier.
int segment_log_decay(const Inputs&, void* log_decay, void* stream);

}  // namespace mamba2::ssd::any
