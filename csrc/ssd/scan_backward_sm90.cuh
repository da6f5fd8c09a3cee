// The sm_90a backward: what its kernels share.
//
//   state_sweeps         S and G of every chunk: chunk_state and state_passing, forward in time for
//                        the states, backward in time for their gradients
//   chunk_scan_gate_backward    with z, between the two: dz, and dy becomes dy silu(z) (launch.h)
//   chunk_scan_backward  everything else, a chunk at a time: dx, dB, dC, the parts of d delta, dD
//   delta_gradients      d_dt; dA and d_dt_bias of a chunk (delta_backward.h)
//   group_sum            slices of dB and dC added up and rounded; dD of a chunk
//   sum_chunks           dA, d_dt_bias and dD (delta_backward.h)
//
// S is the state that enters a chunk of q = 128 tokens, G the gradient of the state that leaves it.
// A state in memory is an image of its tile in shared memory: n / 64 panels of (p = 64) x 64
// elements, swizzled, so that one bulk copy moves it and wgmma reads it as it lies. The forward may
// have kept the images of S (fused_scan_keep_sm90.cuh): state_sweeps then runs for G alone.
//
// n = 256 takes two passes over 128 columns of the state each: all but dB and dC is linear in the
// columns' shares of C B^T, S and G, which the passes leave in arrays that are added up later; what
// the first one gives to dx is left in fp32, and the second one starts from it.
//
// These kernels' heads have 64 channels. A head of p channels is ceil(p / 64) of theirs, which
// share delta, B and C: what they give to d delta is added up by delta_gradients, to dB and dC as
// any heads of a group's. Channels beyond p are read as zero and not written.
#pragma once
#include "../tile/progress.cuh"
#include "../tile/sm90.cuh"
#include "chunks.cuh"
#include "fused_scan_keep_sm90.cuh"
#include "params.h"
#include "steps.cuh"

namespace mamba2::ssd::sm90 {

constexpr int kBackwardQ = kKeptQ;  // tokens a chunk: twice as many would double the work on U
constexpr int kBlock = 64;          // tokens a block: M of one wgmma, a box of a tensor map
constexpr int kHeadDim = 64;        // p of these kernels' heads
constexpr int kDRun = 8;            // tokens whose dy . x are added up first
constexpr int kDParts = kBlock / kDRun;
constexpr int kTurns = 8;  // in which dC of 64 tokens and a group is completed: 4 warps, 2 halves
constexpr unsigned kAllLanes = 0xffffffffu;

struct BackwardArgs {
  ptx::TensorMap x, dy, B, C;         // (b, l, h, p), (b, l, g, n): boxes of 64 tokens x 64 columns
  ptx::TensorMap dx_tiles;            // dx, likewise
  ptx::TensorMap x_eights, B_eights;  // x and B: boxes of 8 tokens
  Chunking chunking;                  // q = 128
  int chunks;                         // bound of the chunk index
  int rows;                           // sequences
  int sm_count;                       // of the card
  int p;                              // of the tensors
  int tensor_h;                       // their heads
  int splits;                         // of these kernels' heads in one of them
  int h, g, n;                  // h = tensor_h splits; n: of a pass, from where on the tensors are
  int tensor_n;                 // of the tensors
  int slices, heads_per_slice;  // of a group's heads: each has its own sums of dB and dC
  int unpaired_pairs;  // pairs of blocks that chunk_scan_backward does not do side by side: the
                       // last group's last, unless all (slices_backward_sm90.cuh)
  int shared_images;   // so many of a pair's images of G are written to once they are read; or none
  const float* delta;  // (chunks, tensor_h, q)
  const float* a_cumsum_log2;  // (chunks, tensor_h, q)
  float* a_run_log2;           // (chunks, tensor_h, q)  the same from the start of each 16 tokens,
                               // without resets
  AnyFloat D;                  // (tensor_h) or (tensor_h, p), optional
  bool D_per_channel;
  AnyFloat initial_states;      // (nseq, tensor_h, p, n), optional
  const float* d_final_states;  // (nseq, tensor_h, p, n), optional
  float* d_initial_states;      // (nseq, tensor_h, p, n), optional
  void* states;                 // (chunks, h, 64 n)  T, images: S
  bool states_kept;             // by the forward
  void* d_states;               // (chunks, h, 64 n)  T, images: G
  int* progress;                // (2, nseq, h)  chunks whose S, G state_sweeps has stored, where
                                // chunk_scan_backward runs beside it
  bool from_middle;             // it takes a sequence's chunks so
  float* dx_sum;                // (chunks, 2, h, 64, 64): dx without delta and D, with two passes
  bool last_pass;
  float* D_rows;          // (h, 64)          D, spread over channels; 0 without D
  StridedOut dx;          // (b, l, tensor_h, p)  T
  float* rows_out;        // (chunks, h, q)     R_i - Q_i + E_i
  float* later_rows;      // (chunks, h, later_apart)  of the later block's 64 tokens: R_i over the
                          //                    earlier ones'
  int later_apart;        // 64, or q where they lie in a_run_log2
  float* columns;         // (chunks, h, q)     sum_{i>=j} V_ij
  float* to_state;        // (chunks, h, q)     F_j / delta_j
  float* through;         // (chunks, h)        K
  float* dD_blocks;       // (chunks, 2, h, 8)  parts, unless D is per channel: then of either block
  float* dD_channels[2];  // (chunks, h, dD_apart)  by channel
  int dD_apart[2];        // 64, or q where they lie in a_cumsum_log2
  float* parts;       // (chunks, slices, g, 5, 64, n)  of dB and dC, by block, of slices that share
                      // no images; otherwise (g, 3, 64, n), of the first pairs' earlier blocks
  float* dC_later;    // (chunks, g, 64, n)  of a single slice: the part of the later block's dC, of
                      // either block, that came first, in fragments
  int* turns;         // (chunks, g, 4, 2)  of a single slice: how many of these parts have come
                      // (chunks, slices, g, 2)  of shared images: whether a block has read them
  StridedOut dB, dC;  // (b, l, g, n)       T
  float* dD;          // (chunks, tensor_h) or (chunks, tensor_h, p), optional
  const int* seq_idx;  // (b, l), optional

  MAMBA2_HD int heads_per_group() const { return h / g; }
  // chunk_scan_backward then rounds and stores dB and dC itself.
  MAMBA2_HD bool single_slice() const { return slices == 1; }
  MAMBA2_HD int pairs() const { return chunks * slices; }  // of a group
  MAMBA2_HD int first_head(int group, int slice) const {
    return group * heads_per_group() + slice * heads_per_slice;
  }
  MAMBA2_HD int64_t head_at(int64_t chunk, int head) const { return chunk * h + head; }
  // The head of the tensors that one of these heads is of, its first channel there, how many
  // channels it has; and where delta has it.
  MAMBA2_HD int tensor_head(int head) const { return head / splits; }
  MAMBA2_HD int channel(int head) const { return head % splits * kHeadDim; }
  MAMBA2_HD int channels(int head) const { return p - channel(head); }
  MAMBA2_HD bool completes_dx() const { return !dx_sum || last_pass; }
  MAMBA2_HD int* progress_of(bool reverse, int i_seq, int head) const {
    return progress + head_at(reverse ? rows + i_seq : i_seq, head);
  }
  // Whether state_sweeps writes K of a chunk, and which direction: it has states unrounded.
  MAMBA2_HD bool K_by_forward_sweep(const Chunk& chunk) const {
    return chunk.is_last && d_final_states && !states_kept;
  }
  MAMBA2_HD bool K_by_reverse_sweep(const Chunk& chunk) const {
    const bool rounded_later = initial_states.ptr && initial_states.dtype == DType::f32;
    return chunk.i_c == 0 && rounded_later && !K_by_forward_sweep(chunk);
  }
};

// Each queues one kernel and returns a cudaError_t as int.
enum class Sweeps { both, states, gradients };
int state_sweeps(const BackwardArgs& args, Sweeps which, DType dtype, void* stream);
// Whether chunk_scan_backward begins beside state_sweeps, in the order of chunks or from the middle
// of each sequence on.
enum class Beside { none, in_order, from_middle };
Beside beside_sweeps(const BackwardArgs& args, Sweeps which);
int chunk_scan_backward(const BackwardArgs& args, DType dtype, void* stream);
int group_sum(const BackwardArgs& args, DType dtype, void* stream);

// Calls f(T{}, integral_constant n) for the instances there are.
template <class F>
int dispatch_backward(DType dtype, int n, F&& f) {
  const auto with_n = [&](auto element) {
    return n == 64 ? f(element, std::integral_constant<int, 64>{})
                   : f(element, std::integral_constant<int, 128>{});
  };
  return dtype == DType::bf16 ? with_n(bf16{}) : with_n(f16{});
}

// Which of the tensors' heads one of these kernels' is of, and its first channel there; on to the
// next one without a division.
struct HeadPlace {
  int head, channel;
  MAMBA2_DEVICE HeadPlace(const BackwardArgs& args, int of)
      : head(args.tensor_head(of)), channel(args.channel(of)) {}
  MAMBA2_DEVICE void advance(const BackwardArgs& args) {
    channel += kHeadDim;
    if (channel == args.splits * kHeadDim) channel = 0, ++head;
  }
};

// All lanes of a warp are done with what came before: one arrival. Of all lanes, when built for
// racecheck, which does not see what __syncwarp orders (docs/profiling.md).
#ifdef MAMBA2_ALL_LANES_ARRIVE
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
MAMBA2_DEVICE void arrive_warp(ptx::Mbarrier* barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals > 1 || lane == 0) ptx::mbarrier_arrive(barrier);
}
// The weights of two elements, each split in two elements of T, so that two instructions do for
// both; what is lost is far below a rounding.
struct alignas(8) PairWeights {
  uint32_t most, rest;
};
template <class T>
MAMBA2_DEVICE PairWeights split_weights(float w0, float w1) {
  const uint32_t most = pack2<T>(w0, w1);
  const float2 kept = unpack2<T>(most);
  return {most, pack2<T>(w0 - kept.x, w1 - kept.y)};
}
template <class T>
MAMBA2_DEVICE uint32_t weigh_pair(uint32_t v, const PairWeights& w) {
  return ptx::fma_rn_x2<T>(v, w.most, ptx::fma_rn_x2<T>(v, w.rest, 0));
}
// The second word: what weigh_pair has lost by rounding.
template <class T>
MAMBA2_DEVICE uint32_t weigh_pair_rest(uint32_t v, const PairWeights& w, uint32_t weighed) {
  const uint32_t minus = weighed ^ 0x80008000u;
  return ptx::fma_rn_x2<T>(v, w.rest, ptx::fma_rn_x2<T>(v, w.most, minus));
}
// A fragment's rows times their weights: register i holds row 8 (i & 1). And the second words.
template <class T>
MAMBA2_DEVICE void scale_rows(uint32_t (&a)[16], const float (&weight)[2]) {
  const PairWeights of[2] = {split_weights<T>(weight[0], weight[0]),
                             split_weights<T>(weight[1], weight[1])};
  MAMBA2_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = weigh_pair<T>(a[i], of[i & 1]);
}
template <class T>
MAMBA2_DEVICE void scale_rows_rest(uint32_t (&a)[16], const float (&weight)[2]) {
  const PairWeights of[2] = {split_weights<T>(weight[0], weight[0]),
                             split_weights<T>(weight[1], weight[1])};
  MAMBA2_UNROLL
  for (int i = 0; i < 16; ++i)
    a[i] = weigh_pair_rest<T>(a[i], of[i & 1], weigh_pair<T>(a[i], of[i & 1]));
}

}  // namespace mamba2::ssd::sm90
