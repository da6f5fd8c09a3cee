// Launchers of the stages. Each queues one kernel on `stream` and returns a cudaError_t as int.
// Arrays between stages: delta and a_cumsum_log2 are fp32, (chunks, h, q), padded with delta = 0
// and a flat sum; chunks are numbered by chunks.cuh. Entries of chunks that do not exist stay
// unwritten.
#pragma once
#include <cstddef>

#include "chunks.cuh"
#include "params.h"
#include "plan.h"

namespace mamba2::ssd {

// ---- chunk_table.cu ----
// Device memory that the chunk table of a packed problem takes; 0 when the rows are dense.
std::size_t chunking_bytes(const Shape& shape, int q);
// Says in *out how chunks are found. Packed: fills the table, in `memory`, from cu_seqlens.
int make_chunking(const Inputs& in, int q, void* memory, Chunking* out, void* stream);

// Packed: the rows of y, or of the gradients, that belong to no sequence are set to zero.
int zero_outside(const ForwardParams& params, const Chunking& chunking, void* stream);
int zero_outside(const BackwardParams& params, const Chunking& chunking, void* stream);
// Packed: the number of chunks on the host is a bound. What is kept (optional) of those beyond the
// last, chunk_bytes each, a multiple of 4, is set to zero: an output has no unwritten element.
int zero_beyond_last_chunk(const Chunking& chunking, const Shape& shape, void* kept,
                           int64_t chunk_bytes, void* stream);

// ---- chunk_cumsum.cu ----
constexpr int kDecayRun = 16;  // tokens
// Counts that the first kernel of a call makes zero for those behind it.
struct ZeroCounts {
  int* first = nullptr;
  int64_t count = 0;
};
// q of `chunking` is 128 or 256. a_rest_log2 (chunks, h, q), optional: what a_cumsum_log2 loses
// by being fp32, so that differences of both together are exact to fp32.
// a_run_log2 (chunks, h, q), optional: the same sums, counted anew from the first token of each
// kDecayRun, to which a token where seq_idx changes adds nothing: who uses them leaves out the
// pairs that it parts.
int chunk_cumsum(const Inputs& in, const Chunking& chunking, float* delta, float* a_cumsum_log2,
                 void* stream, float* a_rest_log2 = nullptr, float* a_run_log2 = nullptr,
                 const ZeroCounts& zeros = {});

namespace sm80 {

constexpr int kChunkTokens = kChunkTokensSm80;

// How much of the head dimension a block takes: 80, 64 or 32, whichever pads p least, then the
// largest. Cards with little shared memory have no room for 80.
inline int head_dim_tile(int p, const Device& device) {
  int best = p <= 32 ? 32 : 64;
  for (int tile : {80, 32}) {
    if (tile == 80 && has_small_smem(device)) continue;
    if (round_up(p, tile) < round_up(p, best)) best = tile;
  }
  return best;
}

// Sequences cut into segments, which the sweeps over chunks take side by side, in two passes: the
// first leaves what each segment adds to the state, segment_passing makes of that what leaves it,
// the second sweeps from there.
struct Segments {
  int chunks = 0;          // of a segment
  int count = 1;           // of the longest sequence there can be; 1: sequences are not cut
  float* carry = nullptr;  // (nseq, count, h, p, n) the state, or its gradient, leaving a segment

  Segments() = default;
  Segments(const Shape& shape, const Plan& plan)
      : chunks(plan.segment_chunks),
        count(chunks > 0 ? int(ceil_div(ceil_div(shape.l, int64_t(plan.q)), int64_t(chunks))) : 1) {
  }
  bool cut() const { return count > 1; }
  int64_t carry_numel(const Shape& shape) const {
    return cut() ? shape.nseq * count * shape.h * shape.p * shape.n : 0;
  }
  // Segments of a sequence of so many chunks, at least one.
  MAMBA2_HD int of(int all_chunks) const {
    return count == 1 || all_chunks <= chunks ? 1 : (all_chunks + chunks - 1) / chunks;
  }
};
// ---- segment_passing_sm80.cu ----
int segment_passing(const Shape& shape, const Chunking& chunking, const Segments& segments,
                    const float* a_cumsum_log2, bool reverse, void* stream);

// ---- chunk_state_sm80.cu: chunk_state and state_passing ----
// states (chunks, h, p, n), x's dtype: the state entering each chunk. final_states (nseq, h, p, n),
// optional. state_rests, as states, optional: what these lose by being rounded, of chunks that let
// the state stay. q of `chunking` is kChunkTokens, here and below.
int chunk_state(const Inputs& in, const Chunking& chunking, const float* delta,
                const float* a_cumsum_log2, void* states, float* final_states,
                const Segments& segments, const Device& device, void* stream,
                void* state_rests = nullptr);

// ---- chunk_scan_sm80.cu ----
// y from the states entering the chunks.
int chunk_scan(const ForwardParams& forward, const Chunking& chunking, const float* delta,
               const float* a_cumsum_log2, const void* states, const Device& device, void* stream);
// A tensor (b, l, h, p) of its own.
inline StridedOut contiguous(void* ptr, const Shape& shape) {
  const int64_t token = int64_t(shape.h) * shape.p;
  return {ptr, shape.l * token, token, shape.p};
}
// The gate backwards: y' = y before the gate is computed once more, and never stored:
//   dz = dy y' silu'(z),  d_y = dy silu(z), the gradient of y'
struct GateBackward {
  Strided dy;      // (b, l, h, p)   T
  StridedOut dz;   // (b, l, h, p)   T, out
  StridedOut d_y;  // (b, l, h, p)   T, out
  int image_n =
      0;  // states are tier sm90's images (scan_backward_sm90.cuh), of so many columns of n
};
// Also for tier sm90, whose chunks have as many tokens.
int chunk_scan_gate_backward(const Inputs& in, const GateBackward& gate, const Chunking& chunking,
                             const float* delta, const float* a_cumsum_log2, const void* states,
                             const Device& device, void* stream);

}  // namespace sm80

}  // namespace mamba2::ssd
