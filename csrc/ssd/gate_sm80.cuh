// The gate y silu(z) on an accumulated (16, 16), eight values a lane, forward and backward.
#pragma once
#include "../ptx/common.cuh"
#include "formulas.cuh"

namespace mamba2::ssd::sm80 {

// In the approximations of the special-function unit: an error of some 2^-22 disappears in the 16
// bits of y, and an exact division is a call, for which registers are lacking.
MAMBA2_DEVICE float fast_sigmoid(float z) {
  return ptx::rcp(1.f + ptx::ex2(-z * static_cast<float>(kLog2E)));
}

// y *= silu(z)
MAMBA2_DEVICE void apply_gate(float (&y)[2][4], const float (&z)[2][4]) {
  MAMBA2_UNROLL for (int e = 0; e < 8; ++e) {
    const float z_e = z[e / 4][e % 4];
    y[e / 4][e % 4] *= z_e * fast_sigmoid(z_e);
  }
}
// From y before the gate and dy after it: z becomes dz = dy y silu'(z), y becomes dy silu(z), the
// gradient of y before the gate.
MAMBA2_DEVICE void gate_gradients(float (&y)[2][4], float (&z)[2][4], const float (&dy)[2][4]) {
  MAMBA2_UNROLL for (int e = 0; e < 8; ++e) {
    float &y_e = y[e / 4][e % 4], &z_e = z[e / 4][e % 4];
    const float dy_e = dy[e / 4][e % 4], s = fast_sigmoid(z_e), silu = z_e * s;
    z_e = dy_e * y_e * (s + silu * (1.f - s));
    y_e = dy_e * silu;
  }
}

}  // namespace mamba2::ssd::sm80
