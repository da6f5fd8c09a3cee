// segment_passing: state_passing from segment to segment, for sweeps that are cut into segments:
//   S_leaving = 2^a S_entering + S_added,   a the log2 decay of the segment's tokens
// or, backward, the same from the last segment to the first. Slot k of `carry` comes as what
// segment k adds (the first one of the walk: all that leaves it) and becomes what leaves it.
//
// grid: (1024 elements of a state, head, sequence). A thread holds four elements and walks the
// segments, kAhead loads in flight; the decays of segments are summed first, by warps. Bytes: 8 a
// state element and segment.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "launch.h"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int kThreads = 256, kAhead = 4;

struct PassingParams {
  Chunking chunking;
  Segments segments;
  const float* a_cumsum_log2;  // (chunks, h, q)
  int h, elements;             // of a head's state
  bool reverse;
};

// decay[k] of the sequence's segments.
MAMBA2_DEVICE void sum_decays(float* decay, const PassingParams& params, int i_seq, int i_h,
                              int count) {
  const int lane = threadIdx.x % 32, all = params.chunking.count(i_seq);
  for (int k = threadIdx.x / 32; k < count; k += kThreads / 32) {
    const int begin = k * params.segments.chunks;
    const int end = begin + params.segments.chunks < all ? begin + params.segments.chunks : all;
    float sum = 0.f;
    for (int i = begin + lane; i < end; i += 32) {
      const int64_t head = int64_t(params.chunking.first(i_seq) + i) * params.h + i_h;
      sum += params.a_cumsum_log2[head * kChunkTokens + kChunkTokens - 1];
    }
    MAMBA2_UNROLL for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) decay[k] = ptx::ex2(sum);
  }
}

__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    segment_passing_kernel(const MAMBA2_GRID_CONSTANT PassingParams params) {
  float* decay = static_cast<float*>(ptx::dynamic_smem());
  const int i_h = blockIdx.y, i_seq = blockIdx.z;
  const int count = params.segments.of(params.chunking.count(i_seq));
  sum_decays(decay, params, i_seq, i_h, count);
  __syncthreads();
  const int element = (blockIdx.x * kThreads + threadIdx.x) * 4;
  if (element >= params.elements) return;

  const int64_t stride = int64_t(params.h) * params.elements;
  float* carry = params.segments.carry + int64_t(i_seq) * params.segments.count * stride +
                 int64_t(i_h) * params.elements + element;
  const auto slot = [&](int i) {
    return reinterpret_cast<float4*>(carry + (params.reverse ? count - 1 - i : i) * stride);
  };
  // What leaves the last segment of the walk is the main sweep's to compute.
  float4 state = count > 1 ? *slot(0) : float4{};
  for (int i0 = 1; i0 < count - 1; i0 += kAhead) {
    float4 added[kAhead];
    MAMBA2_UNROLL for (int i = 0; i < kAhead; ++i) added[i] =
        *slot(i0 + i < count - 1 ? i0 + i : count - 2);
    MAMBA2_UNROLL for (int i = 0; i < kAhead; ++i) {
      if (i0 + i >= count - 1) break;
      const float w = decay[params.reverse ? count - 1 - i0 - i : i0 + i];
      state = {fmaf(w, state.x, added[i].x), fmaf(w, state.y, added[i].y),
               fmaf(w, state.z, added[i].z), fmaf(w, state.w, added[i].w)};
      *slot(i0 + i) = state;
    }
  }
}

}  // namespace

int segment_passing(const Shape& shape, const Chunking& chunking, const Segments& segments,
                    const float* a_cumsum_log2, bool reverse, void* stream) {
  const Range range("segment_passing");
  const int elements = shape.p * shape.n;
  LaunchShape at;
  at.grid = dim3(ceil_div(elements, 4 * kThreads), shape.h, static_cast<unsigned>(shape.nseq));
  at.threads = kThreads;
  at.smem_bytes = sizeof(float) * segments.count;
  return launch(segment_passing_kernel, at, stream,
                PassingParams{chunking, segments, a_cumsum_log2, shape.h, elements, reverse});
}

}  // namespace mamba2::ssd::sm80
