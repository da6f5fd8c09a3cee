// add_norm (see add_norm.h for the equation): a block a row, whose sum of squares it makes.
// A thread has 4 consecutive channels, and more of them where d > 4096. Grid: rows. Shared memory:
// a sum a warp. Bound by the latency of one trip to memory.
// Dtypes other than an fp32 residual with 16-bit x and weight, and rows that are no whole number of
// 4 aligned channels: add_norm_any, channel by channel.
// Deterministic; a row's result does not depend on the others.
#include "add_norm.h"

#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"

namespace mamba2::add_norm {
namespace {

constexpr int kVec = 4, kMaxThreads = 1024, kAnyThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the block of a value a thread, in a fixed order. s_sums: one a warp.
template <class U>
MAMBA2_DEVICE U sum_over_block(U v, U* s_sums) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  if (threadIdx.x % 32 == 0) s_sums[threadIdx.x / 32] = v;
  __syncthreads();
  U sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += s_sums[w];
  return sum;
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kMaxThreads, 1)
    add_norm(MAMBA2_GRID_CONSTANT const Params params) {
  float* s_sums = static_cast<float*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x;
  float* g_residual = static_cast<float*>(params.residual) + row * params.residual_stride;
  const T* g_x = static_cast<const T*>(params.x) + row * params.x_stride;
  const int slab = static_cast<int>(blockDim.x) * kVec;
  const int first_k = static_cast<int>(threadIdx.x) * kVec;

  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  float v[kVec], sum = 0;
  MAMBA2_NO_UNROLL
  for (int k = first_k + (ceil_div(params.d, slab) - 1) * slab; k >= first_k; k -= slab) {
    if (k >= params.d) continue;  // backwards: the first stays in registers
    Packed<float, kVec> residual;
    Packed<T, kVec> x;
    residual.load(g_residual + k);
    if (params.x) x.load(g_x + k);
    residual.unpack(v);
    if (params.x) {
      float added[kVec];
      x.unpack(added);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) v[c] += added[c];
      store_vector(g_residual + k, v);
    }
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) sum += v[c] * v[c];
  }
  const float mean = sum_over_block(sum, s_sums) / float(params.d);
  const float r = 1.f / sqrtf(mean + float(params.eps));
  for (int k = first_k; k < params.d; k += slab) {
    if (k != first_k) load_vector(g_residual + k, v);
    float weight[kVec];
    load_vector(static_cast<const T*>(params.weight) + k, weight);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) v[c] *= r * weight[c];
    store_vector(static_cast<T*>(params.y) + row * params.d + k, v);
  }
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    add_norm_any(MAMBA2_GRID_CONSTANT const Params params) {
  U* s_sums = static_cast<U*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x, first = row * params.residual_stride;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  U sum = 0;
  for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
    U v = load<U>(AnyFloat{params.residual, params.residual_dtype}, first + i);
    if (params.x) {
      v += load<U>(AnyFloat{params.x, params.x_dtype}, row * params.x_stride + i);
      store(params.residual, params.residual_dtype, first + i, v);
      v = load<U>(AnyFloat{params.residual, params.residual_dtype}, first + i);  // rounded
    }
    sum += v * v;
  }
  const U r = U(1) / U(sqrt(sum_over_block(sum, s_sums) / U(params.d) + U(params.eps)));
  for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
    const U v = load<U>(AnyFloat{params.residual, params.residual_dtype}, first + i);
    const U y = v * r * load<U>(AnyFloat{params.weight, params.dtype}, i);
    store(params.y, params.dtype, row * params.d + i, y);
  }
}

bool fits(const Params& params) {
  const auto whole = [](const void* ptr, int64_t stride, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(ptr) % (bytes * kVec) == 0 && stride % kVec == 0;
  };
  const bool dtypes = params.residual_dtype == DType::f32 && size_of(params.dtype) == 2 &&
                      (!params.x || params.x_dtype == params.dtype);
  return dtypes && whole(params.residual, params.residual_stride, 4) &&
         whole(params.x, params.x_stride, 2) && whole(params.weight, params.d, 2) &&
         whole(params.y, params.d, 2);
}

}  // namespace

int run(const Params& params, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(params.b));
  at.programmatic = true;
  if (!fits(params)) {
    const bool wide = params.residual_dtype == DType::f64 || params.dtype == DType::f64;
    return with_accumulator(wide ? DType::f64 : DType::f32, [&](auto tag) {
      using U = typename decltype(tag)::type;
      at.threads = kAnyThreads;
      at.smem_bytes = sizeof(U) * kAnyThreads / 32;
      return launch(add_norm_any<U>, at, stream, params);
    });
  }
  const int threads = round_up(ceil_div(params.d, kVec), 32);
  at.threads = threads < kMaxThreads ? threads : kMaxThreads;
  at.smem_bytes = sizeof(float) * at.threads / 32;
  return params.dtype == DType::bf16 ? launch(add_norm<bf16>, at, stream, params)
                                     : launch(add_norm<f16>, at, stream, params);
}

}  // namespace mamba2::add_norm
