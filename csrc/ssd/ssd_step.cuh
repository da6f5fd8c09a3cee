// What the kernels of ssd_step share: a token's scalars, and sums over neighbouring lanes.
#pragma once
#include "../core/activations.cuh"
#include "../core/convert.cuh"
#include "formulas.cuh"
#include "ssd_step.h"

namespace mamba2::ssd {

constexpr unsigned kAllLanes = 0xffffffffu;

template <int kLanes, class U>
MAMBA2_DEVICE U sum_over_lanes(U v) {
  MAMBA2_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// What a token of a head does to every row: H = decay H + delta x B^T.
template <class U>
struct TokenWeights {
  U delta, decay;
};
// What they are made of, as it lies in memory: of every 8 lanes the first has dt, the second the
// bias, the third A, so that all three are on their way at once.
struct TokenScalars {
  AnyBits mine;

  MAMBA2_DEVICE void load(const Inputs& in, int64_t i_b, int i_t, int i_h) {
    const int which = threadIdx.x % 8;
    const int64_t dt_at = i_b * in.dt.b + i_t * in.dt.l + i_h * in.dt.h;
    const AnyFloat dt{in.dt.ptr, in.dt_dtype};
    const AnyFloat from = which == 0 ? dt : which == 1 ? in.dt_bias : in.A;
    if (which < 3 && from) mine = load_bits(from, which == 0 ? dt_at : i_h);
  }
  template <class U>
  MAMBA2_DEVICE TokenWeights<U> weights(const Inputs& in) const {
    const U v = value_of<U>(mine), dt = __shfl_sync(kAllLanes, v, 0, 8);
    const U bias = __shfl_sync(kAllLanes, v, 1, 8), A = __shfl_sync(kAllLanes, v, 2, 8);
    const U delta = delta_of(dt, bias, in.dt_softplus, U(in.dt_min), U(in.dt_max)).value;
    return {delta, exp(delta * A)};
  }
};
MAMBA2_DEVICE AnyBits load_skip_weight(const Inputs& in, int i_h, int i_p) {
  return load_bits(in.D, in.D_per_channel ? int64_t(i_h) * in.shape.p + i_p : i_h);
}
MAMBA2_DEVICE int64_t at_token(const Strided& t, int64_t i_b, int i_t, int i_h) {
  return i_b * t.b + i_t * t.l + int64_t(i_h) * t.h;
}

}  // namespace mamba2::ssd
