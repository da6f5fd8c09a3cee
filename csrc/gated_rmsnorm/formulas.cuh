// One channel of gated_rmsnorm, for the CPU loops and the CUDA kernels.
#pragma once
#include "../core/macros.h"

namespace mamba2::gated_rmsnorm {

// What the kinds of gate come to: silu(z) and its derivative inside the norm, or outside; 1 and 0
// where there is none.
template <class U>
struct Gate {
  U inside = 1, outside = 1, d_inside = 0, d_outside = 0;
};
template <class U>
MAMBA2_HD Gate<U> gate_of(U silu, U silu_gradient, bool has_z, bool norm_before_gate) {
  Gate<U> gate;
  if (has_z && norm_before_gate) {
    gate.outside = silu;
    gate.d_outside = silu_gradient;
  } else if (has_z) {
    gate.inside = silu;
    gate.d_inside = silu_gradient;
  }
  return gate;
}

template <class U>
struct Gradients {
  U dx, dz, dweight;
};
// With n = v r and dn = dy weight outside: dv = r (dn - n mean(dn n)); projection is mean(dn n).
template <class U>
MAMBA2_HD Gradients<U> gradients_of(U x, U dy, U weight, const Gate<U>& gate, U r, U projection) {
  const U n = x * gate.inside * r, g = dy * gate.outside;
  const U dv = r * (g * weight - n * projection);
  return {dv * gate.inside, dv * x * gate.d_inside + dy * n * weight * gate.d_outside, g * n};
}

}  // namespace mamba2::gated_rmsnorm
