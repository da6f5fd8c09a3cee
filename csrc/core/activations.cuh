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

}  // namespace mamba2::fast
