// Each formula of the operator once, for the CPU loops and every CUDA path (docs/ssd.md).
#pragma once
#include <math.h>  // and not cmath: functions of the argument's own type without std::

#include "../core/macros.h"

namespace mamba2::ssd {

// 2^-160 is 0 in fp32 with a wide margin, and a chunk of such tokens keeps its sums small.
constexpr double kMinDecayLog2 = -160.0;
constexpr double kLog2E = 1.4426950408889634;

// log(1 + e^v); above 20 the difference to v is below fp32 rounding.
template <class T>
MAMBA2_HD T softplus(T v) {
  return v > T(20) ? v : log1p(exp(v));
}
template <class T>
MAMBA2_HD T sigmoid(T v) {
  return T(1) / (T(1) + exp(-v));
}
template <class T>
MAMBA2_HD T silu(T v) {
  return v * sigmoid(v);
}
// d silu / dv
template <class T>
MAMBA2_HD T silu_gradient(T v) {
  const T s = sigmoid(v);
  return s * (T(1) + v * (T(1) - s));
}

// delta = clamp(softplus(dt + bias)): the step size, and its derivative in dt (0 where clamped).
template <class T>
struct Delta {
  T value, gradient;
};
template <class T>
MAMBA2_HD Delta<T> delta_of(T dt, T bias, bool dt_softplus, T dt_min, T dt_max) {
  const T v = dt + bias;
  const T raw = dt_softplus ? softplus(v) : v;
  const T slope = dt_softplus ? sigmoid(v) : T(1);
  if (raw < dt_min) return {dt_min, T(0)};
  if (raw > dt_max) return {dt_max, T(0)};
  return {raw, slope};
}

// log2 of one token's decay exp(delta A), clamped from below (see kMinDecayLog2).
template <class T>
MAMBA2_HD T decay_log2(T delta, T A) {
  const T a = delta * A * T(kLog2E);
  return a > T(kMinDecayLog2) ? a : T(kMinDecayLog2);
}
// Whether the clamp acted: then the decay is 0 and no gradient passes through it.
template <class T>
MAMBA2_HD bool decay_clamped(T delta, T A) {
  return !(delta * A * T(kLog2E) > T(kMinDecayLog2));
}

}  // namespace mamba2::ssd
