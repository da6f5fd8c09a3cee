// How much of the incoming state a segment lets through, for ssd_segment_state of any tier:
//   log_decay = sum_t delta_t A     natural log, fp32 (fp64 when x is)
// Grid: batch row and head; the sum has one order. Bound by latency: one read of dt.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U>
struct Shared {
  U warps[kThreads / 32];
};

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1) log_decay_any(Inputs in, void* log_decay) {
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const int i_h = blockIdx.x % in.shape.h;
  const int64_t row = blockIdx.x / in.shape.h;
  U sum = 0;
  for (int64_t token = threadIdx.x; token < in.shape.l; token += kThreads) {
    sum += delta_at<U>(in, row, token, i_h).value;
  }
  sum = block_sum(sum, s.warps);
  if (threadIdx.x == 0) static_cast<U*>(log_decay)[blockIdx.x] = sum * load<U>(in.A, i_h);
}

}  // namespace

int segment_log_decay(const Inputs& in, void* log_decay, void* stream) {
  const Range range("segment_log_decay");
  return with_accumulator(in.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(in.shape.b * in.shape.h);
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<U>);
    return launch(log_decay_any<U>, at, stream, in, log_decay);
  });
}

}  // namespace mamba2::ssd::any
