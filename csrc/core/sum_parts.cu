// sum_parts: a block sums 32 neighbouring elements; each of its 8 or 32 warps takes every 8th or
// 32nd part, and their sums are added in order. Bound by the latency of a few trips to L2, where
// the parts lie.
#include "sum_parts.h"

#include "../ptx/common.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace mamba2 {
namespace {

constexpr int kLanes = 32;
constexpr int kFewWarps = 8, kManyWarps = 32, kManyParts = 128;

template <class U, int kWarps>
__global__ void MAMBA2_LAUNCH_BOUNDS(kLanes* kWarps, 1)
    sum_parts_kernel(MAMBA2_GRID_CONSTANT const SumPartsParams params) {
  U* s_sums = static_cast<U*>(ptx::dynamic_smem());  // (kWarps, kLanes)
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t i = int64_t(blockIdx.x) * kLanes + lane;
  const U* g_parts = static_cast<const U*>(params.parts);
  U sum = 0;
  if (i < params.numel) {
    for (int64_t part = warp; part < params.count; part += kWarps) {
      sum += g_parts[part * params.numel + i];
    }
  }
  s_sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || i >= params.numel) return;
  for (int w = 1; w < kWarps; ++w) sum += s_sums[w * kLanes + lane];
  U* out = static_cast<U*>(i < params.split ? params.first : params.second);
  if (out) out[i < params.split ? i : i - params.split] = sum;
}

}  // namespace

int sum_parts(const SumPartsParams& params, void* stream) {
  return with_accumulator(params.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    const auto run = [&](auto warps) {
      LaunchShape at;
      at.grid = dim3(static_cast<unsigned>(ceil_div(params.numel, kLanes)));
      at.threads = kLanes * warps();
      at.smem_bytes = sizeof(U) * kLanes * warps();
      return launch(sum_parts_kernel<U, warps()>, at, stream, params);
    };
    if (params.count < kManyParts) return run(std::integral_constant<int, kFewWarps>{});
    return run(std::integral_constant<int, kManyWarps>{});
  });
}

}  // namespace mamba2
