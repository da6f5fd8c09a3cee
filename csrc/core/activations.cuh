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

// log(1 + e^v) = max(v, 0) + log1p(e^-|v|), the latter by a polynomial of relative error 3e-8:
// within four units in the last place, and with no branch that would part it from its neighbours.
MAMBA2_DEVICE float softplus(float v) {
  constexpr float kHigh = static_cast<float>(ssd::kLog2E);
  constexpr float kLow = static_cast<float>(ssd::kLog2E - kHigh);
  const float u = -fminf(fabsf(v), 126.f), power = u * kHigh;
  const float rest = fmaf(u, kLow, fmaf(u, kHigh, -power));
  float e = ptx::ex2(power);
  e = fmaf(e, rest * 0.693147181f, e);
  float r = 0.00523268504f;
  r = fmaf(r, e, -0.0295051993f);
  r = fmaf(r, e, 0.078225883f);
  r = fmaf(r, e, -0.136632396f);
  r = fmaf(r, e, 0.191060037f);
  r = fmaf(r, e, -0.248429814f);
  r = fmaf(r, e, 0.333190967f);
  r = fmaf(r, e, -0.499994931f);
  r = fmaf(r, e, 0.99999997f);
  return fmaf(e, r, v < 0.f ? 0.f : v);
}

}  // namespace mamba2::fast
