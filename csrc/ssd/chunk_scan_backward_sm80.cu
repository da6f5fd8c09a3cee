// chunk_scan_backward: what happens inside a chunk, head by head:
//   dx_j = delta_j (2^(s_q-s_j) G B_j + sum_{i>=j} L_ij (C_i.B_j) dy_i) + D dy_j
//   V_ij = L_ij (C_i.B_j) (dy_i.x_j), fp32, of which only sums are kept:
//     rows R_i - Q_i, R_i = sum_{j<i} V_ij delta_j, Q_j = delta_j sum_{i>j} V_ij
//     columns sum_{i>=j} V_ij
//   F_j / delta_j = 2^(s_q-s_j) x_j.(G B_j)
//   dCB_ij = sum over heads of L_ij delta_j (dy_i.x_j), rounded once
// L_ij = 2^(s_i - s_j) with s in two words: between tokens that forget all, s is large and V small.
//
// grid: (chunk, group, split of the group's heads); a block runs over the heads of its split with
// dCB in registers. Blocks of 16 x 16 tokens, on and below the diagonal only: a warp owns 16 tokens
// j and runs over the tokens i >= j, everything transposed (j down, i across), so that L o C B^T,
// rounded, is at once the A operand of the product with dy. Warps that share a scheduler own an
// upper and a lower j block: equal work. C B^T, the same for all heads, is computed once and lies
// in shared memory in fp32, each thread's elements where only it reads them. Three ways to lie in
// shared memory (p up to 64 but for the last; KB at p 64, n 128):
//   resident  B and all of G, one or two stages of (x, dy, G): 122 or 172
//   streamed  64 columns of B and G at a time, loaded again for every head: 98, for small cards
//             and large n
//   wide      streamed, p up to 128, dx in two slices of 64 channels: 132
// Bound by HBM (x, dy, G read, dx written) and, close behind, by ldmatrix and issue slots.
#include "../core/launch.h"
#include "chunk_scan_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

template <class Kind>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    chunk_scan_backward_kernel(const MAMBA2_GRID_CONSTANT ScanParams params) {
  const Shared<Kind> shared(ptx::dynamic_smem(), params);
  const Place at(params);
  const Chunk chunk = params.chunking.at(at.i_chunk);
  if (chunk.i_seq < 0) return skip_chunk(params, at);
  const int i_warp = threadIdx.x / 32;
  // Warps w and w + 4 share a scheduler: their blocks j add up to kBlocks - 1.
  const int block_j = i_warp < 4 ? i_warp : kBlocks + 3 - i_warp;

  compute_CB(shared, params, at, chunk, block_j);
  for (int s = 0; s < params.stages; ++s) start_head(shared, params, at, chunk, s);

  float dCB[kBlocks][2][4] = {};
  MAMBA2_NO_UNROLL for (int i = 0; at.first_head + i < at.end_head; ++i) {
    const auto stage = shared.stage(i % params.stages);
    if (params.stages == 2) ptx::cp_async_wait_group<1>();
    if (params.stages == 1) ptx::cp_async_wait_group<0>();
    __syncthreads();
    const Rows rows(stage, block_j);
    Sums sums;
    MAMBA2_NO_UNROLL for (int p0 = 0; p0 < (Kind::kWide ? params.p : 1); p0 += 64) {
      float dx[8][4] = {};
      from_states(dx, shared, stage, params, at, chunk, rows, at.first_head + i, p0);
      sums.to_state<Kind>(dx, stage.x, rows, p0);
      MAMBA2_UNROLL for (int k = 0; k < kBlocks; ++k) {
        if (block_j + k >= kBlocks) break;
        inside_block(dx, dCB[k], sums, shared, stage, params, rows, block_j + k, k == 0, p0);
      }
      store_dx(dx, shared, stage, params, chunk, rows, at.first_head + i, i_warp, p0);
    }
    sums.store(shared, rows, params, int64_t(at.i_chunk) * params.h + at.first_head + i);
    __syncthreads();
    store_sums(shared, params, at, at.first_head + i);
    start_head(shared, params, at, chunk, i + params.stages);
  }
  store_dCB<typename Kind::T>(dCB, params, at, block_j);
}

template <class Kind>
int run(const ScanParams& params, void* stream) {
  LaunchShape at;
  at.grid = dim3(params.chunks * params.g * params.splits);
  at.threads = kThreads;
  at.smem_bytes = std::size_t(Shared<Kind>::bytes(params));
  at.tile = {q, Kind::kP, Kind::kResident ? params.n : 64, params.stages};
  return launch(chunk_scan_backward_kernel<Kind>, at, stream, params);
}

template <class Kind>
bool fits(ScanParams& params, int stages, int max_smem_bytes) {
  params.stages = stages;
  return Shared<Kind>::bytes(params) <= max_smem_bytes;
}
template <class T>
int run(ScanParams params, int max_smem_bytes, void* stream) {
  if (params.p > 64) {
    params.stages = 1;
    return run<Wide<T>>(params, stream);
  }
  if (fits<Resident<T>>(params, 2, max_smem_bytes) || fits<Resident<T>>(params, 1, max_smem_bytes))
    return run<Resident<T>>(params, stream);
  return run<Streamed<T>>(params, stream);
}

}  // namespace

int chunk_scan_backward(const BackwardProblem& problem, const ChunkScanBackward& scan,
                        void* stream) {
  const Range range("chunk_scan_backward");
  const Shape& shape = problem.shape;
  const ScanParams params{scan,
                          problem.chunking,
                          problem.chunks,
                          shape.h,
                          shape.p,
                          shape.g,
                          shape.n,
                          problem.splits,
                          1,
                          problem.delta,
                          problem.a_cumsum_log2,
                          problem.a_rest_log2};
  return problem.dtype == DType::bf16 ? run<bf16>(params, problem.max_smem_bytes, stream)
                                      : run<f16>(params, problem.max_smem_bytes, stream);
}

}  // namespace mamba2::ssd::sm80
