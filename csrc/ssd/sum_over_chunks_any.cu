// The last step of the backward: dA, d_dt_bias and dD from the parts that the chunks left, summed
// in one order.
// Grid: head. Shared memory: 64 bytes (fp64). Bound by memory: one read of the parts.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "matmul_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U>
struct Shared {
  U warps[kThreads / 32];
};

// sum over chunks of parts[chunk, i_h]
template <class U>
MAMBA2_DEVICE U sum_of(const void* parts, const SumOverChunksParams& params, Shared<U>& s) {
  U sum = 0;
  for (int64_t i = threadIdx.x; i < params.chunks; i += kThreads) {
    sum += static_cast<const U*>(parts)[i * params.h + blockIdx.x];
  }
  return block_sum(sum, s.warps);
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1) sum_over_chunks_any(SumOverChunksParams params) {
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const int i_h = blockIdx.x;
  const U dA = sum_of(params.dA_parts, params, s);
  if (threadIdx.x == 0) static_cast<U*>(params.dA)[i_h] = dA;
  if (params.d_dt_bias) {
    const U d_dt_bias = sum_of(params.d_dt_bias_parts, params, s);
    if (threadIdx.x == 0) static_cast<U*>(params.d_dt_bias)[i_h] = d_dt_bias;
  }
  if (!params.dD) return;
  U over_channels = 0;
  for (int i_p = threadIdx.x; i_p < params.p; i_p += kThreads) {
    U sum = 0;
    for (int64_t i = 0; i < params.chunks; ++i) {
      sum += static_cast<const U*>(params.dD_parts)[(i * params.h + i_h) * params.p + i_p];
    }
    if (params.dD_per_channel) static_cast<U*>(params.dD)[int64_t(i_h) * params.p + i_p] = sum;
    over_channels += sum;
  }
  if (params.dD_per_channel) return;
  over_channels = block_sum(over_channels, s.warps);
  if (threadIdx.x == 0) static_cast<U*>(params.dD)[i_h] = over_channels;
}

}  // namespace

int sum_over_chunks(const SumOverChunksParams& params, void* stream) {
  const Range range("sum_over_chunks");
  return with_accumulator(params.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(params.h);
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<U>);
    return launch(sum_over_chunks_any<U>, at, stream, params);
  });
}

}  // namespace mamba2::ssd::any
