// conv_scan_norm: all that stands between a mixer's two projections, as one operator.
//
//   x, B, C = silu(causal_conv1d(x, B, C))
//   y       = ssd_scan(x, dt, A, B, C) + D x     A = -exp(A_log), dt = softplus(dt + dt_bias)
//   out     = norm(y, z)                         without a norm y silu(z), inside the scan
//
// It runs the three operators of these names, and in the backward theirs. One call of the host's
// costs less than three, and their arguments are slices that need no Python to be cut.
#pragma once
#include <math.h>  // and not cmath: functions of the argument's own type without std::

#include "../core/dtype.h"
#include "../core/macros.h"

namespace mamba2::conv_scan_norm {

template <class T>
MAMBA2_HD T decay_rate(T A_log) {
  return -exp(A_log);
}

// ---- CUDA: returns a cudaError_t as int ----
// A (h) of `dtype`, fp32 or fp64, from A_log (h).
int decay_rates(const AnyFloat& A_log, int h, void* A, DType dtype, void* stream);
// dA (h) of `dtype`, fp32 or fp64, becomes the gradient of A_log: dA A.
int scale_by_rates(const AnyFloat& A, int h, void* dA, DType dtype, void* stream);

}  // namespace mamba2::conv_scan_norm
