// chunk_cumsum: the step size and the cumulative log-decay inside each chunk,
//   delta_t = clamp(softplus(dt_t + dt_bias)),  a_cumsum_log2_t = log2(e) sum_{u <= t} delta_u A
// over the tokens u of the chunk (seq_idx: see steps.cuh). Tokens past the chunk's end get delta =
// 0 and decay 1, so that the last entry of a chunk is always its whole decay.
//
// grid: (chunk, 16 heads), heads fastest. dt is read along the heads (its contiguous direction) and
// written along the tokens, turned over in shared memory; a warp then scans one head's tokens, a
// run of them a lane. The sums are fp64, and what their rounding to fp32 loses is an output of its
// own, for the backward: a token between two resets, or between two tokens that forget all, takes
// part in the decay gradient with the decay of a pair (docs/numerics.md). Or the sums are counted
// anew from the first of each run of 16 tokens, which serves the same end where runs are what a
// kernel works on. As the first kernel of a call it can make counts zero for later ones.
// Shared memory: 2 x 16 x (q + 2) floats. Bound by the 8 h q bytes it writes a chunk (21 MB at b 8,
// l 4096, h 80) and by latency when the problem is small.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "launch.h"
#include "steps.cuh"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 256, kHeads = 16;
constexpr int kWarps = kThreads / 32, kTokenStep = kThreads / kHeads;

struct CumsumParams {
  StepInputs steps;
  Chunking chunking;
  int h;
  float* delta;          // (chunks, h, q) out
  float* a_cumsum_log2;  // (chunks, h, q) out
  float* a_rest_log2;    // (chunks, h, q) out, optional
  float* a_run_log2;     // (chunks, h, q) out, optional
  ZeroCounts zeros;
};

template <int q>
struct CumsumShared {
  float delta[kHeads][q + 2];  // two heads and two tokens of a warp fall in 32 different banks
  float a[kHeads][q + 2];
};

MAMBA2_DEVICE void make_zero(const ZeroCounts& zeros) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < zeros.count; i += threads)
    zeros.first[i] = 0;
}

template <int q>
MAMBA2_DEVICE void load_steps(const CumsumParams& params, const Chunk& chunk, int head_base,
                              CumsumShared<q>& shared) {
  const int head = threadIdx.x % kHeads, i_h = head_base + head;
  if (i_h >= params.h) return;
  const StepInputs& in = params.steps;
  const int first = threadIdx.x / kHeads;
  float r_dt[q / kTokenStep];
  load_dt<q / kTokenStep, kTokenStep>(in, chunk.row, chunk.token, i_h, first, chunk.count, r_dt);
  const float A = load<float>(in.A, i_h);
  const float bias = in.dt_bias.ptr ? load<float>(in.dt_bias, i_h) : 0.f;
  MAMBA2_UNROLL for (int k = 0; k < q / kTokenStep; ++k) {
    const int t = first + k * kTokenStep;
    Step step{0.f, 0.f};
    if (t < chunk.count)
      step = step_of(in, r_dt[k], bias, A, resets(in, chunk.row, chunk.token + t));
    shared.delta[head][t] = step.delta;
    shared.a[head][t] = step.a_log2;
  }
}

// A lane's run of consecutive tokens, in fp32.
template <int kRun, class Value>
MAMBA2_DEVICE void store_run(float* out, Value&& value) {
  MAMBA2_UNROLL for (int k = 0; k < kRun; k += 4) * reinterpret_cast<float4*>(out + k) =
      float4{static_cast<float>(value(k)), static_cast<float>(value(k + 1)),
             static_cast<float>(value(k + 2)), static_cast<float>(value(k + 3))};
}

// One head's tokens, by a warp: each lane adds up a run, the lanes' sums are scanned.
template <int q>
MAMBA2_DEVICE void sum_head(const CumsumParams& params, const float (&delta)[q + 2],
                            const float (&a)[q + 2], int64_t out, int lane) {
  constexpr int kRun = q / 32, kRunLanes = kDecayRun / kRun;
  const int first = lane * kRun;
  double sum[kRun], before = 0;  // of this lane's tokens; of the lanes before
  MAMBA2_UNROLL for (int k = 0; k < kRun; ++k) sum[k] = a[first + k] + (k > 0 ? sum[k - 1] : 0.);
  before = __shfl_up_sync(~0u, inclusive_sum(sum[kRun - 1], lane), 1);
  if (lane == 0) before = 0;
  const double before_run = __shfl_sync(~0u, before, lane / kRunLanes * kRunLanes);
  MAMBA2_UNROLL for (int k = 0; k < kRun; ++k) sum[k] += before;

  store_run<kRun>(params.delta + out + first, [&](int k) { return delta[first + k]; });
  store_run<kRun>(params.a_cumsum_log2 + out + first, [&](int k) { return sum[k]; });
  if (params.a_run_log2)
    store_run<kRun>(params.a_run_log2 + out + first, [&](int k) { return sum[k] - before_run; });
  if (params.a_rest_log2)
    store_run<kRun>(params.a_rest_log2 + out + first,
                    [&](int k) { return sum[k] - static_cast<float>(sum[k]); });
}

template <int q>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, q == 128 ? 4 : 3)
    chunk_cumsum_kernel(MAMBA2_GRID_CONSTANT const CumsumParams params) {
  ptx::griddepcontrol_launch_dependents();
  CumsumShared<q>& shared = *static_cast<CumsumShared<q>*>(ptx::dynamic_smem());
  const int head_tiles = ceil_div(params.h, kHeads);
  const int i_chunk = blockIdx.x / head_tiles, head_base = blockIdx.x % head_tiles * kHeads;
  const Chunk chunk = params.chunking.at(i_chunk);
  make_zero(params.zeros);
  if (chunk.i_seq < 0) return;

  load_steps(params, chunk, head_base, shared);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int head = warp; head < kHeads && head_base + head < params.h; head += kWarps) {
    const int64_t out = (static_cast<int64_t>(i_chunk) * params.h + head_base + head) * q;
    sum_head<q>(params, shared.delta[head], shared.a[head], out, lane);
  }
}

template <int q>
int run(const CumsumParams& params, int64_t chunks, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(chunks * ceil_div(params.h, kHeads)));
  at.threads = kThreads;
  at.smem_bytes = sizeof(CumsumShared<q>);
  at.tile.tokens = q;
  return launch(chunk_cumsum_kernel<q>, at, stream, params);
}

}  // namespace

int chunk_cumsum(const Inputs& in, const Chunking& chunking, float* delta, float* a_cumsum_log2,
                 void* stream, float* a_rest_log2, float* a_run_log2, const ZeroCounts& zeros) {
  const Range range("chunk_cumsum");
  const CumsumParams params{step_inputs(in), chunking,    in.shape.h, delta,
                            a_cumsum_log2,   a_rest_log2, a_run_log2, zeros};
  const int64_t chunks = in.shape.chunks(chunking.q);
  switch (chunking.q) {
    case 128:
      return run<128>(params, chunks, stream);
    case 256:
      return run<256>(params, chunks, stream);
    default:
      return 1;  // cudaErrorInvalidValue
  }
}

}  // namespace mamba2::ssd
