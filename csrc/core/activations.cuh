// The gates of the layers around the scan, by the fast instructions where fp32 has them: about two
// units in the last place, so far below what a 16-bit result is rounded by.
#pragma once
#include "../ptx/common.cuh"
#include "../ssd/formulas.cuh"

namespace mamba2::fast {

MAMBA2_DEVICE float sigmoid(float v) {
  return ptx::rcp(1.f + ptx::ex2(-v * static_cast<float>(ssd::kLog2E)));
}
MAMBA2_DEVICE double sigmoid(double v) { return ssd::sigmoid(v); }
template <class U>
MAMBA2_DEVICE U silu(U v) {
  return v * sigmoid(v);
}
// d silu / dv, s being sigmoid(v)
template <class U>
MAMBA2_DEVICE U silu_gradient(U v, U s) {
  return s * (U(1) + v * (U(1) - s));
}
template <class U>
MAMBA2_DEVICE U silu_gradient(U v) {
  return silu_gradient(v, sigmoid(v));
}

// log(1 + e^v) = max(v, 0) + log1p(e), e being e^-|v|: e times a polynomial of relative error 3e-8
// whose first coefficient is 1, with no branch that would part it from its neighbours.
MAMBA2_DEVICE float softplus(float v, float e) {
  float r = 0.0053648246f;
  r = fmaf(r, e, -0.030065792f);
  r = fmaf(r, e, 0.07920454f);
  r = fmaf(r, e, -0.13753803f);
  r = fmaf(r, e, 0.19153655f);
  r = fmaf(r, e, -0.24857163f);
  r = fmaf(r, e, 0.33321324f);
  r = fmaf(r, e, -0.49999648f);
  r = fmaf(r, e, 1.f);
  return fmaf(e, r, v < 0.f ? 0.f : v);
}
// As exact as log1p of exp (docs/numerics.md).
MAMBA2_DEVICE float softplus(float v) { return softplus(v, expf(-fabsf(v))); }
// Within four units in the last place, for a thread that waits for each step: e of v log2(e) in two
// words takes half as many instructions one after another as expf does.
MAMBA2_DEVICE float quick_softplus(float v) {
  constexpr float kHigh = static_cast<float>(ssd::kLog2E);
  constexpr float kLow = static_cast<float>(ssd::kLog2E - kHigh);
  const float u = -fminf(fabsf(v), 126.f), power = u * kHigh;
  const float rest = fmaf(u, kLow, fmaf(u, kHigh, -power)), e = ptx::ex2(power);
  return softplus(v, fmaf(e, rest * 0.693147181f, e));
}
// d softplus / dv, relatively as exact far below 0 as near it.
MAMBA2_DEVICE float softplus_slope(float v) {
  const float e = expf(-fabsf(v)), r = ptx::rcp(1.f + e);
  return v < 0.f ? e * r : r;
}

}  // namespace mamba2::fast
