// decay_rates: A = -exp(A_log), and its gradient: dA A. A thread a head.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "conv_scan_norm.h"

namespace mamba2::conv_scan_norm {
namespace {

constexpr int kThreads = 128;

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    decay_rates_kernel(const AnyFloat A_log, int h, U* A) {
  const int i_h = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i_h < h) A[i_h] = decay_rate(load<U>(A_log, i_h));
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    scale_by_rates_kernel(const AnyFloat A, int h, U* dA) {
  const int i_h = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i_h < h) dA[i_h] *= load<U>(A, i_h);
}

LaunchShape shape_of(int h) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(h, kThreads)));
  at.threads = kThreads;
  return at;
}

}  // namespace

int decay_rates(const AnyFloat& A_log, int h, void* A, DType dtype, void* stream) {
  const Range range("decay_rates");
  return with_accumulator(dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    return launch(decay_rates_kernel<U>, shape_of(h), stream, A_log, h, static_cast<U*>(A));
  });
}

int scale_by_rates(const AnyFloat& A, int h, void* dA, DType dtype, void* stream) {
  const Range range("scale_by_rates");
  return with_accumulator(dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    return launch(scale_by_rates_kernel<U>, shape_of(h), stream, A, h, static_cast<U*>(dA));
  });
}

}  // namespace mamba2::conv_scan_norm
