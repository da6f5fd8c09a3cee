// state_passing, any type and size: the recurrence from chunk to chunk, forwards or backwards.
//   met_c = state;  state = decay_c state + added_c
// In place: `states` holds what each chunk adds and then what each chunk meets.
// Grid: (sequence and head, 256 elements of (p, n)); a thread carries one element through all
// chunks, the next one already on its way. Bound by memory: one read and one write of the states.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U, bool kBackwards>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1) state_passing_any(StatePassingParams params) {
  const Shape& shape = params.work.in.shape;
  const int64_t numel = int64_t(shape.p) * shape.n;
  const int64_t i_pn = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (i_pn >= numel) return;
  const int i_h = blockIdx.x % shape.h, i_seq = blockIdx.x / shape.h;
  const int count = params.work.chunking.count(i_seq);
  const int first = params.work.chunking.first(i_seq);
  const auto i_state = [&](int step) {
    return int64_t(first + (kBackwards ? count - 1 - step : step)) * shape.h + i_h;
  };

  U* g_states = static_cast<U*>(params.states);
  const U* g_decay = static_cast<const U*>(params.decay);
  const int64_t i_outer = (int64_t(i_seq) * shape.h + i_h) * numel + i_pn;
  U state = params.from ? load<U>(params.from, i_outer) : U(0);
  U next_added = count > 0 ? g_states[i_state(0) * numel + i_pn] : U(0);
  for (int step = 0; step < count; ++step) {
    const U added = next_added;
    if (step + 1 < count) next_added = g_states[i_state(step + 1) * numel + i_pn];
    g_states[i_state(step) * numel + i_pn] = state;
    state = g_decay[i_state(step)] * state + added;
  }
  if (params.to) static_cast<U*>(params.to)[i_outer] = state;
}

template <bool kBackwards>
int run(const StatePassingParams& params, void* stream) {
  const Shape& shape = params.work.in.shape;
  return with_accumulator(params.work.in.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(shape.nseq * shape.h, ceil_div(int64_t(shape.p) * shape.n, kThreads));
    at.threads = kThreads;
    return launch(state_passing_any<U, kBackwards>, at, stream, params);
  });
}

}  // namespace

int state_passing(const StatePassingParams& params, void* stream) {
  const Range range("state_passing");
  return run<false>(params, stream);
}
int state_passing_gradient(const StatePassingParams& params, void* stream) {
  const Range range("state_passing_gradient");
  return run<true>(params, stream);
}

}  // namespace mamba2::ssd::any
