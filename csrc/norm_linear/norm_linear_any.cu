// norm_linear element by element, for every dtype and size (see norm_linear.h for the equation).
// A block norms one row, group by group, into shared memory, and each of its warps makes some of
// the outputs. Grid: (rows, outputs / 64). Shared memory: d numbers, and a sum a warp.
// Bound by latency.
#include "norm_linear_any.h"

#include "../core/activations.cuh"
#include "../core/dispatch.cuh"
#include "../core/launch.h"

namespace mamba2::norm_linear {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kOutputs = 64;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

template <class U>
MAMBA2_DEVICE U sum_over_warp(U v) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}
// What a value becomes when it is kept in `dtype`.
template <class U>
MAMBA2_DEVICE U rounded(U v, DType dtype) {
  if (dtype == DType::bf16) return convert<U>(convert<bf16>(v));
  if (dtype == DType::f16) return convert<U>(convert<f16>(v));
  return dtype == DType::f32 ? U(float(v)) : v;
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    norm_linear_any(MAMBA2_GRID_CONSTANT const Params params) {
  U* s_v = static_cast<U*>(ptx::dynamic_smem());  // (d)
  U* s_sums = s_v + params.d;                     // (kWarps)
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto gate = [&](int i) {
    if (!params.z.ptr) return Gate<U>{};
    const U z = load<U>(AnyFloat{params.z.ptr, params.x_dtype}, row * params.z.stride + i);
    return gate_of(fast::silu(z), params.norm_before_gate);
  };
  for (int first = 0; first < params.d; first += params.s) {
    U sum = 0;
    for (int i = first + threadIdx.x; i < first + params.s; i += kThreads) {
      const U x = load<U>(AnyFloat{params.x.ptr, params.x_dtype}, row * params.x.stride + i);
      s_v[i] = x * gate(i).inside;
      sum += s_v[i] * s_v[i];
    }
    sum = sum_over_warp(sum);
    __syncthreads();
    if (lane == 0) s_sums[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += s_sums[w];
    const U r = U(1) / U(sqrt(sum / U(params.s) + U(params.eps)));
    for (int i = first + threadIdx.x; i < first + params.s; i += kThreads) {
      const U v = s_v[i] * r * load<U>(params.norm_weight, i) * gate(i).outside;
      s_v[i] = rounded(v, params.dtype);
    }
  }
  __syncthreads();
  const int begin = static_cast<int>(blockIdx.y) * kOutputs;
  for (int output = begin + warp; output < begin + kOutputs; output += kWarps) {
    if (output >= params.o) break;
    U sum = 0;
    for (int i = lane; i < params.d; i += 32) {
      const int64_t at = int64_t(output) * params.d + i;
      sum += s_v[i] * load<U>(AnyFloat{params.weight, params.dtype}, at);
    }
    sum = sum_over_warp(sum);
    if (lane != 0) continue;
    if (params.bias) sum += load<U>(params.bias, output);
    const int64_t at = row * params.out.stride + output;
    if (params.add) sum += load<U>(AnyFloat{params.out.ptr, params.out_dtype}, at);
    store(params.out.ptr, params.out_dtype, at, sum);
  }
}

}  // namespace

int run_any(const Params& params, void* stream) {
  return with_accumulator(params.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid =
        dim3(static_cast<unsigned>(params.b), static_cast<unsigned>(ceil_div(params.o, kOutputs)));
    at.threads = kThreads;
    at.smem_bytes = sizeof(U) * (params.d + kWarps);
    return launch(norm_linear_any<U>, at, stream, params);
  });
}

}  // namespace mamba2::norm_linear
