// chunk_cumsum: the step size and the cumulative log-decay inside each chunk,
//   delta_t = clamp(softplus(dt_t + dt_bias)),  a_cumsum_log2_t = log2(e) sum_{u <= t} delta_u A
// over the tokens u of the chunk (seq_idx: see steps.cuh). Tokens past the chunk's end get delta =
// 0 and decay 1, so that the last entry of a chunk is always its whole decay.
//
// grid: (chunk, 16 heads), heads fastest. dt is read along the heads (its contiguous direction),
// two heads a thread, and written along the tokens, turned over in shared memory; then a warp scans
// two heads' tokens side by side, a run of them a lane. The sums are fp64, and what their rounding
// to fp32 loses is an output of its own, for the backward: a token between two resets, or between
// two tokens that forget all, takes part in the decay gradient with the decay of a pair
// (docs/numerics.md). Or the sums are counted anew from the first of each run of 16 tokens, and
// without resets, which serves the same end where runs are what a kernel works on: it leaves out
// the pairs that a reset parts. (Kernels of their own do so: others pay nothing for resets.) As the
// first kernel of a call it can make counts zero for later ones.
// Shared memory: 16 heads x q floats and their padding. Bound by issuing, by the 12 h q bytes it
// writes a chunk (31 MB at b 8, l 4096, h 80), which are whole sectors, and by latency when the
// problem is small.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "head_tile.cuh"
#include "launch.h"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kTokenStep = kThreads / kTilePairs;
constexpr int kWarpHeads = kTileHeads / kWarps;
template <int q>
constexpr int kRun = q / 32;  // tokens of a lane
template <int q>
using Tile = HeadTile<q, kRun<q>>;
template <int q>
using Pair = PairOfHeads<q / kTokenStep, kTokenStep>;

struct CumsumParams {
  StepInputs steps;
  bool paired;  // dt of two heads is a word
  Chunking chunking;
  int h;
  Divisor head_tiles;
  float* delta;          // (chunks, h, q) out
  float* a_cumsum_log2;  // (chunks, h, q) out
  float* a_rest_log2;    // (chunks, h, q) out, optional
  float* a_run_log2;     // (chunks, h, q) out, optional
  ZeroCounts zeros;
};

MAMBA2_DEVICE void make_zero(const ZeroCounts& zeros) {
  const uint32_t threads = gridDim.x * kThreads;
  MAMBA2_NO_UNROLL
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < zeros.count; i += threads)
    zeros.first[i] = 0;
}

// dt of a pair of heads becomes delta, 0 past the chunk's end.
template <int q>
MAMBA2_DEVICE void take_steps(const CumsumParams& params, const Chunk& chunk, const Pair<q>& pair,
                              Tile<q>& s_delta) {
  constexpr int kSteps = q / kTokenStep;
  float2 v[kSteps];
  pair.biased(params.steps, params.paired, chunk, v);
  MAMBA2_UNROLL for (int k = 0; k < kSteps; ++k) {
    const int t = pair.token(k);
    const float2 delta{bounded_delta(params.steps, v[k].x, fast::softplus(v[k].x)),
                       bounded_delta(params.steps, v[k].y, fast::softplus(v[k].y))};
    s_delta.at(pair.head, t) = t < chunk.count ? delta.x : 0.f;
    s_delta.at(pair.head + 1, t) = t < chunk.count ? delta.y : 0.f;
  }
}

// A lane's tokens, in fp32.
template <int q, class Value>
MAMBA2_DEVICE void store_values(float* out, Value&& value) {
  float r[kRun<q>];
  MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) r[k] = static_cast<float>(value(k));
  store_run(out, r);
}

// What resets take from the sums of a lane's tokens since the first of their 16, in all heads; or
// nothing.
template <int q, bool kAny>
struct RunResets {
  int count[kRun<q>];

  MAMBA2_DEVICE RunResets(const StepInputs& in, const Chunk& chunk, int lane) {
    const int first = lane * kRun<q>;
    MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) {
      const bool reset = first + k < chunk.count && resets(in, chunk.row, chunk.token + first + k);
      count[k] = reset + (k > 0 ? count[k - 1] : 0);
    }
    constexpr int kLanes = kDecayRun / kRun<q>;
    const int all = count[kRun<q> - 1], before = inclusive_sum<kLanes>(all, lane % kLanes) - all;
    MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) count[k] += before;
  }
  MAMBA2_DEVICE double without(int k, double sum) const { return sum - kMinDecayLog2 * count[k]; }
};
template <int q>
struct RunResets<q, false> {
  MAMBA2_DEVICE RunResets(const StepInputs&, const Chunk&, int) {}
  MAMBA2_DEVICE double without(int, double sum) const { return sum; }
};

// A lane's tokens of one head.
template <int q>
struct Run {
  float delta[kRun<q>];
  double sum[kRun<q>], before;  // over this lane's tokens; over those of the lanes before

  MAMBA2_DEVICE Run(const StepInputs& in, const Chunk& chunk, float A, const float* s_delta,
                    int first) {
    float a[kRun<q>];
    load_row(delta, s_delta);
    MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) a[k] = decay_log2(delta[k], A);
    if (chunk.count < q || in.seq_idx) {
      MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) {
        if (first + k >= chunk.count)
          a[k] = 0;
        else if (resets(in, chunk.row, chunk.token + first + k))
          a[k] = static_cast<float>(kMinDecayLog2);
      }
    }
    MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) sum[k] = a[k] + (k > 0 ? sum[k - 1] : 0.);
  }
  MAMBA2_DEVICE void scan(int lane) {
    before = __shfl_up_sync(~0u, inclusive_sum(sum[kRun<q> - 1], lane), 1);
    if (lane == 0) before = 0;
  }
  template <class Resets>
  MAMBA2_DEVICE void store(const CumsumParams& params, int64_t out, double before_run,
                           const Resets& resets) {
    MAMBA2_UNROLL for (int k = 0; k < kRun<q>; ++k) sum[k] += before;
    store_run(params.delta + out, delta);
    store_values<q>(params.a_cumsum_log2 + out, [&](int k) { return sum[k]; });
    if (params.a_run_log2)
      store_values<q>(params.a_run_log2 + out,
                      [&](int k) { return resets.without(k, sum[k] - before_run); });
    if (params.a_rest_log2)
      store_values<q>(params.a_rest_log2 + out,
                      [&](int k) { return sum[k] - static_cast<float>(sum[k]); });
  }
};

template <int q, bool kRunResets>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, (q == 128 ? 5 : 3) - kRunResets)
    chunk_cumsum_kernel(MAMBA2_GRID_CONSTANT const CumsumParams params) {
  ptx::griddepcontrol_launch_dependents();
  Tile<q>& s_delta = *static_cast<Tile<q>*>(ptx::dynamic_smem());
  const int i_chunk = blockIdx.x / params.head_tiles;
  const int first_head = blockIdx.x % params.head_tiles * kTileHeads;
  const Chunk chunk = params.chunking.at(i_chunk);
  make_zero(params.zeros);
  if (chunk.i_seq < 0) return;

  const Pair<q> pair(params.steps, params.paired, chunk, first_head, params.h);
  // Warps of heads that do not exist go on.
  const int row = threadIdx.x / 32 * kWarpHeads, lane = threadIdx.x % 32, first = lane * kRun<q>;
  const int i_h = min(first_head + row, params.h - 1), more = i_h + 1 < params.h;
  const AnyFloat& A = params.steps.A;
  const uint32_t A_bits[kWarpHeads] = {load_bits_of(A, i_h), load_bits_of(A, i_h + more)};
  take_steps<q>(params, chunk, pair, s_delta);
  __syncthreads();

  static_assert(kWarpHeads == 2, "side by side");
  Run<q> run(params.steps, chunk, float_of_bits(A.dtype, A_bits[0]), &s_delta.at(row, first),
             first);
  Run<q> next(params.steps, chunk, float_of_bits(A.dtype, A_bits[1]), &s_delta.at(row + 1, first),
              first);
  run.scan(lane), next.scan(lane);
  constexpr int kRunLanes = kDecayRun / kRun<q>;
  const double before_run = __shfl_sync(~0u, run.before, lane / kRunLanes * kRunLanes);
  const double before_next = __shfl_sync(~0u, next.before, lane / kRunLanes * kRunLanes);
  if (first_head + row >= params.h) return;
  const int64_t out = (static_cast<int64_t>(i_chunk) * params.h + i_h) * q + first;
  const RunResets<q, kRunResets> resets(params.steps, chunk, lane);
  run.store(params, out, before_run, resets);
  if (more) next.store(params, out + q, before_next, resets);
}

template <int q>
int run(const CumsumParams& params, int64_t chunks, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(chunks * params.head_tiles.value));
  at.threads = kThreads;
  at.smem_bytes = sizeof(Tile<q>);
  at.tile.tokens = q;
  if (params.a_run_log2 && params.steps.seq_idx)
    return launch(chunk_cumsum_kernel<q, true>, at, stream, params);
  return launch(chunk_cumsum_kernel<q, false>, at, stream, params);
}

}  // namespace

int chunk_cumsum(const Inputs& in, const Chunking& chunking, float* delta, float* a_cumsum_log2,
                 void* stream, float* a_rest_log2, float* a_run_log2, const ZeroCounts& zeros) {
  const Range range("chunk_cumsum");
  const int h = in.shape.h;
  const CumsumParams params{step_inputs(in),
                            heads_pair_up(in.dt, in.dt_dtype, h),
                            chunking,
                            h,
                            Divisor(ceil_div(h, kTileHeads)),
                            delta,
                            a_cumsum_log2,
                            a_rest_log2,
                            a_run_log2,
                            zeros};
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
