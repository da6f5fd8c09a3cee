// linear_rows on tensor cores (see linear_rows.h for the equation). A block has 64 rows and 32
// outputs, all channels of them: 128 at a time, through a ring of 6. Grid: (outputs / 32, 1, rows /
// 64). Shared memory: 6 x 24 KB. Bound by the latency of one trip to memory, and by every block's
// reading all of its rows.
// bf16; d and o multiples of 8, rows aligned to 16 bytes. Deterministic; a row's result does not
// depend on the others.
#include "linear_rows.h"

#include "../core/launch.h"
#include "row_product.cuh"

namespace mamba2::norm_linear {
namespace {

constexpr int kOutputs = 32, kChunk = 128;
constexpr int kStages = 6;

struct Stage {
  tile::SharedTile<T, kOutputs, kChunk> weight;
  tile::SharedTile<T, kRows, kChunk> x;
};

__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    linear_rows(MAMBA2_GRID_CONSTANT const Params params) {
  Stage* s_stages = static_cast<Stage*>(ptx::dynamic_smem());  // (kStages)
  const Part part(params, kOutputs, 0, params.d);
  const int chunks = part.chunks(kChunk);
  ptx::griddepcontrol_launch_dependents();
  if (!params.early_weights) ptx::griddepcontrol_wait();
  MAMBA2_UNROLL
  for (int c = 0; c < kStages; ++c) {
    if (c < chunks) part.request_weight(params, c * kChunk, s_stages[c].weight);
  }
  ptx::griddepcontrol_wait();
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
  warp.for_pairs([&](int row, int output, float2 sums) {
    const int at = part.first_output + output;
    if (row >= part.rows || at >= params.o) return;
    const uint32_t pair = pack2<T>(sums.x, sums.y);
    *reinterpret_cast<uint32_t*>(g_out + (part.first_row + row) * params.out.stride + at) = pair;
  });
}

}  // namespace

int run_linear_rows(const Params& params, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(params.o, kOutputs)), 1,
                 static_cast<unsigned>(ceil_div(params.b, int64_t{kRows})));
  at.threads = kThreads;
  at.smem_bytes = sizeof(Stage) * kStages;
  at.programmatic = true;
  return launch(linear_rows, at, stream, params);
}

}  // namespace mamba2::norm_linear
