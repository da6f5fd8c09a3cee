// linear_rows on tensor cores (see linear_rows.h for the equations). A block has 64 rows and 32
// outputs, all channels of them: 128 at a time, through a ring of 6 or 4. Grid: (outputs / 32, 1,
// rows / 64). Shared memory: 6 x 24 KB. Bound by the latency of one trip to memory, and by every
// block's reading all of its rows. A thread has pairs of outputs; those that are channels wait for
// their product with the taps and the inputs before in registers. bf16; d and o multiples of 8,
// rows aligned to 16 bytes. Deterministic; a row's result does not depend on the others.
#include "linear_rows.h"

#include "../core/activations.cuh"
#include "../core/launch.h"
#include "row_product.cuh"

namespace mamba2::norm_linear {
namespace {

constexpr int kOutputs = kOutputsOfBlock, kChunk = 128;
constexpr int kManyStages = 6, kFewStages = 4;  // 144 KB of shared memory, or what any card has

struct Stage {
  tile::SharedTile<T, kOutputs, kChunk> weight;
  tile::SharedTile<T, kRows, kChunk> x;
};

// A thread's outputs that are channels: their taps, and what the convolution has seen of the rows.
template <int kWidth>
struct Channels {
  static constexpr int kPairs = WarpSums<kOutputs>::kPairs;  // of neighbouring outputs
  static constexpr int kBefore = kWidth > 0 ? kWidth - 1 : 0;
  // As they lie in memory: nothing waits for them before the product is done.
  Packed<T, 2> weight[kPairs][kWidth > 0 ? kWidth : 1];  // 2 kWidth taps: of one, then the other
  Packed<T, 2> bias[kPairs], before[kPairs][kBefore > 0 ? kBefore : 1];
  static MAMBA2_DEVICE bool has(const ConvStep& conv, int output) {
    return kWidth > 0 && output >= conv.first && output < conv.first + conv.d;
  }
  static MAMBA2_DEVICE T* state(const ConvStep& conv, int64_t row, int k, int output) {
    T* g_state = static_cast<T*>(conv.state) + row * conv.state_stride;
    return g_state + int64_t(k) * conv.d + output - conv.first;
  }

  MAMBA2_DEVICE void load(const ConvStep& conv, const Part& part) {
    if constexpr (kWidth == 0) return;
    WarpSums<kOutputs>::for_places([&](int i, int row, int output) {
      const int at = part.first_output + output, channel = at - conv.first;
      if (row >= part.rows || !has(conv, at)) return;
      const T* g_weight = static_cast<const T*>(conv.weight) + int64_t(channel) * kWidth;
      MAMBA2_UNROLL
      for (int k = 0; k < kWidth; ++k) weight[i][k].load(g_weight + 2 * k);
      bias[i].zero();
      if (conv.bias) bias[i].load(static_cast<const T*>(conv.bias) + channel);
      MAMBA2_UNROLL
      for (int k = 0; k < kBefore; ++k) before[i][k].load(state(conv, part.first_row + row, k, at));
    });
  }
  // The convolution of pair i's newest inputs, which become part of the state.
  MAMBA2_DEVICE Packed<T, 2> step(const ConvStep& conv, int i, int64_t row, int output,
                                  const Packed<T, 2>& newest) {
    float sums[2], x[2], taps[kWidth > 0 ? 2 * kWidth : 1];
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      weight[i][k].unpack(x);
      taps[2 * k] = x[0], taps[2 * k + 1] = x[1];
    }
    bias[i].unpack(sums);
    newest.unpack(x);
    MAMBA2_UNROLL
    for (int c = 0; c < 2; ++c) sums[c] += taps[c * kWidth + kBefore] * x[c];
    MAMBA2_UNROLL
    for (int k = 0; k < kBefore; ++k) {
      before[i][k].unpack(x);
      MAMBA2_UNROLL
      for (int c = 0; c < 2; ++c) sums[c] += taps[c * kWidth + k] * x[c];
      const Packed<T, 2>& after = k + 1 < kBefore ? before[i][k + 1] : newest;
      after.store(state(conv, row, k, output));
    }
    MAMBA2_UNROLL
    for (float& sum : sums) sum = conv.silu ? fast::silu(sum) : sum;
    Packed<T, 2> y;
    y.pack(sums);
    return y;
  }
};

template <int kWidth, int kStages>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    linear_rows(MAMBA2_GRID_CONSTANT const Params params,
                MAMBA2_GRID_CONSTANT const ConvStep conv) {
  Stage* s_stages = static_cast<Stage*>(ptx::dynamic_smem());  // (kStages)
  const Part part(params, kOutputs, 0, params.d);
  const int chunks = part.chunks(kChunk);
  if (!params.early_weights) ptx::griddepcontrol_wait();
  MAMBA2_UNROLL
  for (int c = 0; c < kStages; ++c) {
    if (c < chunks) part.request_weight(params, c * kChunk, s_stages[c].weight);
  }
  Channels<kWidth> channels;
  channels.load(conv, part);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  MAMBA2_UNROLL
  for (int c = 0; c < kStages; ++c) {
    if (c < chunks) part.request_rows(params.x, c * kChunk, s_stages[c].x);
    ptx::cp_async_commit_group();
  }

  WarpSums<kOutputs> warp;
  MAMBA2_NO_UNROLL
  for (int c = 0; c < chunks; ++c) {
    Stage& stage = s_stages[c % kStages];
    ptx::cp_async_wait_group<kStages - 1>();
    __syncthreads();
    warp.multiply(stage.x, stage.weight);
    if (c + kStages < chunks) {
      __syncthreads();  // all have read the stage
      part.request_weight(params, (c + kStages) * kChunk, stage.weight);
      part.request_rows(params.x, (c + kStages) * kChunk, stage.x);
    }
    ptx::cp_async_commit_group();
  }
  T* g_out = static_cast<T*>(params.out.ptr);
  WarpSums<kOutputs>::for_places([&](int i, int row, int output) {
    const int at = part.first_output + output;
    if (row >= part.rows || at >= params.o) return;
    Packed<T, 2> y;
    y.pack(warp.pair(i));
    if (channels.has(conv, at)) y = channels.step(conv, i, part.first_row + row, at, y);
    y.store(g_out + (part.first_row + row) * params.out.stride + at);
  });
}

template <int kWidth, int kStages>
int run_as(const Params& params, const ConvStep& conv, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(params.o, kOutputs)), 1,
                 static_cast<unsigned>(ceil_div(params.b, int64_t{kRows})));
  at.threads = kThreads;
  at.smem_bytes = sizeof(Stage) * kStages;
  at.programmatic = true;
  return launch(linear_rows<kWidth, kStages>, at, stream, params, conv);
}
template <int kStages>
int run_as(const Params& params, const ConvStep& conv, void* stream) {
  if (conv.w == 0) return run_as<0, kStages>(params, conv, stream);
  if (conv.w == 2) return run_as<2, kStages>(params, conv, stream);
  if (conv.w == 3) return run_as<3, kStages>(params, conv, stream);
  return run_as<4, kStages>(params, conv, stream);
}

}  // namespace

int run_linear_rows(const Params& params, const ConvStep& conv, int max_smem_bytes, void* stream) {
  const bool has_many = max_smem_bytes >= int{sizeof(Stage)} * kManyStages;
  return has_many ? run_as<kManyStages>(params, conv, stream)
                  : run_as<kFewStages>(params, conv, stream);
}

}  // namespace mamba2::norm_linear
