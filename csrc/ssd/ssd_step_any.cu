// ssd_step for any sizes and any types: a warp a row of the state, element by element.
// Grid: (head of a batch entry, kThreads / 32 rows). No shared memory.
// Deterministic; nothing depends on the batch.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "ssd_step.cuh"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 64;
constexpr int kAnyColumns = 8;  // a thread's: n <= 256

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    step_any(MAMBA2_GRID_CONSTANT const StepParams params) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const int lane = threadIdx.x % 32, i_h = blockIdx.x % shape.h;
  const int i_g = i_h / shape.heads_per_group();
  const int i_p = blockIdx.y * (kThreads / 32) + threadIdx.x / 32;
  const int64_t i_b = blockIdx.x / shape.h;
  if (i_p >= shape.p) return;
  const StepSlots slots = slots_of(params, i_b);
  const int64_t row = (int64_t(i_h) * shape.p + i_p) * shape.n;
  const auto input = [&](const Strided& t, int64_t at) {
    return load<U>(AnyFloat{t.ptr, in.dtype}, at);
  };

  U H[kAnyColumns];
  for (int k = 0; k < kAnyColumns; ++k) {
    const int i_n = k * 32 + lane;
    const int64_t at = slots.source * params.slot_stride + row + i_n;
    const bool there = slots.source >= 0 && i_n < shape.n;
    H[k] = there ? load<U>(AnyFloat{params.state, params.state_dtype}, at) : U(0);
  }
  for (int i_t = 0; i_t < shape.l; ++i_t) {
    TokenScalars scalars;
    scalars.load(in, i_b, i_t, i_h);
    const TokenWeights<U> weights = scalars.weights<U>(in);
    const U x = input(in.x, at_token(in.x, i_b, i_t, i_h) + i_p);
    U y = 0;
    for (int k = 0; k < kAnyColumns; ++k) {
      const int i_n = k * 32 + lane;
      if (i_n >= shape.n) break;
      const U B = input(in.B, at_token(in.B, i_b, i_t, i_g) + i_n);
      H[k] = weights.decay * H[k] + weights.delta * x * B;
      y += H[k] * input(in.C, at_token(in.C, i_b, i_t, i_g) + i_n);
    }
    y = sum_over_lanes<32>(y);
    if (in.D) y += value_of<U>(load_skip_weight(in, i_h, i_p)) * x;
    if (in.z) y *= silu(input(in.z, at_token(in.z, i_b, i_t, i_h) + i_p));
    const int64_t at = ((i_b * shape.l + i_t) * shape.h + i_h) * shape.p + i_p;
    if (lane == 0) store(params.y, in.dtype, at, slots.source >= 0 ? y : U(0));
  }
  if (slots.source < 0 || slots.target < 0) return;
  for (int k = 0; k < kAnyColumns; ++k) {
    const int i_n = k * 32 + lane;
    const int64_t at = slots.target * params.slot_stride + row + i_n;
    if (i_n < shape.n) store(params.state, params.state_dtype, at, H[k]);
  }
}

}  // namespace

int ssd_step_any(const StepParams& params, void* stream) {
  const Shape& shape = params.in.shape;
  return with_accumulator(params.in.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(static_cast<unsigned>(shape.b * shape.h), ceil_div(shape.p, kThreads / 32));
    at.threads = kThreads;
    return launch(step_any<U>, at, stream, params);
  });
}

}  // namespace mamba2::ssd
