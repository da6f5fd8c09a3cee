// dB and dC where the heads of a group are taken in slices: the sums of the slices, added up in
// their order and rounded.
// Grid: (chunk and group, 256 elements of (q, n)). Bound by memory: one read of the slices' sums.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    sum_over_slices_any(ChunkScanGradientParams params) {
  using U = accumulator_t<T>;
  const Shape& shape = params.work.in.shape;
  const int64_t chunk_group = blockIdx.x, chunk_groups = params.work.chunks * shape.g;
  const Chunk chunk = params.work.chunking.at(blockIdx.x / shape.g);
  const int element = blockIdx.y * kThreads + threadIdx.x;
  const int i = element / shape.n, i_n = element % shape.n;
  if (chunk.i_seq < 0 || i >= chunk.count) return;
  const auto sum_of = [&](const void* slices) {
    const U* v = static_cast<const U*>(slices) + chunk_group * kChunk * shape.n + element;
    U sum = 0;
    for (int slice = 0; slice < params.slices; ++slice) {
      sum += v[slice * chunk_groups * kChunk * shape.n];
    }
    return convert<T>(sum);
  };
  const int i_g = blockIdx.x % shape.g;
  first_of<T>(params.dB, chunk, i_g)[i * params.dB.l + i_n] = sum_of(params.dB_slices);
  first_of<T>(params.dC, chunk, i_g)[i * params.dC.l + i_n] = sum_of(params.dC_slices);
}

}  // namespace

int sum_over_slices(const ChunkScanGradientParams& params, void* stream) {
  const Range range("sum_over_slices");
  const Shape& shape = params.work.in.shape;
  return with_type(params.work.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(params.work.chunks * shape.g, ceil_div(kChunk * shape.n, kThreads));
    at.threads = kThreads;
    return launch(sum_over_slices_any<T>, at, stream, params);
  });
}

}  // namespace mamba2::ssd::any
