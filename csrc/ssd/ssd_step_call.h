// One call of ssd_step, ready to run on any device.
#pragma once
#include "../core/host.h"
#include "ssd_step.h"

namespace mamba2::ssd {

// What ssd_step is given (csrc/ops.cpp).
struct StepArguments {
  Tensor state, x, dt, A, B, C;
  OptionalTensor D, z, dt_bias;
  bool dt_softplus = false;
  double dt_min = 0, dt_max = 0;
  OptionalTensor state_indices, out_state_indices;
  bool early_state = false;
};

struct StepCall {
  StepParams params;
  Tensor y;                  // shaped as x
  std::vector<Tensor> kept;  // copies that params point into
};

// Checks, copies what cannot be read in place, allocates y.
StepCall prepare_step(const StepArguments& arguments);

}  // namespace mamba2::ssd
