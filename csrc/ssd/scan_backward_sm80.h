// Stages of the sm_80 backward. Each launcher queues one kernel and returns a cudaError_t as int.
// Notation and equations: docs/ssd.md. Inside a chunk of q tokens s_t is the inclusive cumulative
// log2 decay; S is the state that enters the chunk, G the gradient of the state that leaves it.
#pragma once
#include "launch.h"

namespace mamba2::ssd::sm80 {

constexpr int q = kChunkTokens;

// What all stages know of the problem.
struct BackwardProblem {
  Shape shape;
  DType dtype = DType::bf16;  // T
  Chunking chunking;          // q is kChunkTokens
  int chunks = 0;
  const float* delta = nullptr;          // (chunks, h, q)
  const float* a_cumsum_log2 = nullptr;  // (chunks, h, q)
  const float* a_rest_log2 = nullptr;    // (chunks, h, q)   what a_cumsum_log2 lacks
  Segments segments;
  int splits = 1;  // of the heads of a group: plan_head_splits
  int sm_count = 1;
  int max_smem_bytes = 0;  // that a block of this card may have
};

// ---- state_gradients_backward_sm80.cu: chunk_state and state_passing, in reverse ----
//   G_prev = 2^s_q G + sum_i 2^s_i dy_i C_i^T,   K = 2^s_q <G, S>
struct StateGradients {
  Strided dy;                             // (b, l, h, p)          T
  Strided C;                              // (b, l, g, n)          T
  const void* S = nullptr;                // (chunks, h, p, n)     T
  bool S_rests = false;                   // whether G holds what S has lost by being rounded
  const float* initial_states = nullptr;  // (nseq, h, p, n)       optional: S before its rounding
  const float* d_final_states = nullptr;  // (nseq, h, p, n)       optional: zeros
  void* G = nullptr;                      // (chunks, h, p, n)     T, out
  float* K = nullptr;                     // (parts, chunks, h)    out
  float* d_initial_states = nullptr;      // (nseq, h, p, n)       out, optional
};
int state_gradients_parts(const Shape& shape);
int state_gradients(const BackwardProblem& problem, const StateGradients& scan, void* stream);

// ---- chunk_scan_backward_sm80.cu: inside the chunk, head by head ----
struct ChunkScanBackward {
  Strided x, dy;  // (b, l, h, p)            T
  Strided B, C;   // (b, l, g, n)            T
  AnyFloat D;     // (h) or (h, p)           optional
  bool D_per_channel = false;
  const void* G = nullptr;    // (chunks, h, p, n)       T
  StridedOut dx;              // (b, l, h, p)            T, out
  void* dCB = nullptr;        // (chunks, g, splits, q, q) T, out: [j][i], summed over the split
  float* rows = nullptr;      // (chunks, h, q)          out: R_i - Q_i; may lie in a_rest_log2
  float* columns = nullptr;   // (chunks, h, q)          out: sum_{i>=j} V_ij
  float* to_state = nullptr;  // (chunks, h, q)          out: F_j / delta_j
  float* dD = nullptr;        // (chunks, width of D)    out, with D
};
int chunk_scan_backward(const BackwardProblem& problem, const ChunkScanBackward& scan,
                        void* stream);

// ---- group_scan_backward_sm80.cu: dB and dC, sums over the heads of a group ----
struct GroupScanBackward {
  Strided x, dy;                // (b, l, h, p)            T
  Strided B, C;                 // (b, l, g, n)            T
  const void* S = nullptr;      // (chunks, h, p, n)       T
  const void* G = nullptr;      // (chunks, h, p, n)       T
  const void* dCB = nullptr;    // (chunks, g, splits, q, q) T
  float* from_state = nullptr;  // (parts, chunks, h, q)   out: E_i
  float* partial = nullptr;  // (2, splits, chunks, q, g, n) workspace: dB, dC; unless splits == 1
  StridedOut dB, dC;         // (b, l, g, n)            T, out
};
int group_scan_parts(const Shape& shape);
int group_scan_backward(const BackwardProblem& problem, const GroupScanBackward& scan,
                        void* stream);

}  // namespace mamba2::ssd::sm80
