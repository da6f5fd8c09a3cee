// ssd_step on a CUDA device: check, one launch. The host emulation registers this file for CPU
// tensors, in a namespace of its own.
#include "../core/device.h"
#include "ssd_step_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::ssd {
namespace {

// There is one kernel and nothing of it depends on the batch: no plan to make.
Tensor step(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
            OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus, double dt_min,
            double dt_max, OptionalTensor state_indices, OptionalTensor out_state_indices,
            int64_t /*plan*/, bool early_state) {
  const StepCall call = prepare_step({state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min,
                                      dt_max, state_indices, out_state_indices, early_state});
  const OnDevice at(x);
  at.check_launch("ssd_step", ssd_step(call.params, at.stream()));
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("ssd_step", TORCH_BOX(&step));
}

}  // namespace mamba2::ssd
