// causal_conv1d for the next token, or T of them: a thread takes one channel of a batch entry, its
// last w - 1 inputs in registers. Grid: threads over (b, d). Bound by the latency of one trip to
// memory: a layer's state is a few hundred kilobytes.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kThreads = 128;

template <class T, int kWidth>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    conv_step(MAMBA2_GRID_CONSTANT const StepParams params) {
  using U = accumulator_t<T>;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, i_b = i / params.d;
  const int i_d = static_cast<int>(i % params.d);
  if (i_b >= params.b) return;
  const int64_t slot = params.state_indices ? params.state_indices[i_b] : i_b;
  const bool padding = slot < 0 || slot >= params.slots;
  T* g_state = static_cast<T*>(params.state) + slot * params.slot_stride + i_d;
  const T* g_x = static_cast<const T*>(params.x.ptr) + i_b * params.x.b + i_d;
  T* g_y = static_cast<T*>(params.y) + i_b * params.tokens * params.d + i_d;
  if (padding) {
    for (int64_t t = 0; t < params.tokens; ++t) g_y[t * params.d] = convert<T>(0.f);
    return;
  }
  Taps<U, kWidth, 1> taps;
  taps.load(params.weight, params.bias, i_d);
  Window<U, kWidth, 1> window;
  MAMBA2_UNROLL
  for (int k = 0; k < kWidth - 1; ++k) window.x[k][0] = convert<U>(g_state[k * params.d]);
  for (int64_t t = 0; t < params.tokens; ++t) {
    const U x[1] = {convert<U>(g_x[t * params.x.l])};
    const U y = window.convolve(taps, x[0], 0);
    g_y[t * params.d] = convert<T>(params.silu ? fast::silu(y) : y);
    window.push(x);
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kWidth - 1; ++k) g_state[k * params.d] = convert<T>(window.x[k][0]);
}

}  // namespace

int step(const StepParams& params, void* stream) {
  return with_type(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return with_width<T>(params.w, false, [&](auto, auto width, auto) {
      LaunchShape at;
      at.grid = dim3(static_cast<unsigned>(ceil_div(params.b * params.d, kThreads)));
      at.threads = kThreads;
      at.programmatic = true;
      return launch(conv_step<T, width()>, at, stream, params);
    });
  });
}

}  // namespace mamba2::causal_conv1d
