// From dt to the step size and the log-decay of one token, on the device: what chunk_cumsum sums.
#pragma once
#include "../core/activations.cuh"
#include "../core/convert.cuh"
#include "formulas.cuh"
#include "params.h"

namespace mamba2::ssd {

// What steps are made from, as an argument of a kernel.
struct StepInputs {
  Strided dt;  // (b, l, h)
  DType dt_dtype;
  AnyFloat A;        // (h)
  AnyFloat dt_bias;  // (h), optional
  bool dt_softplus;
  float dt_min, dt_max;
  const int* seq_idx;  // (b, l), optional
  int64_t l;
};
inline StepInputs step_inputs(const Inputs& in) {
  return {in.dt,
          in.dt_dtype,
          in.A,
          in.dt_bias,
          in.dt_softplus,
          static_cast<float>(in.dt_min),
          static_cast<float>(in.dt_max),
          in.seq_idx,
          in.shape.l};
}

// dt of the tokens first, first + kStep, ... of a chunk for one head, all loads in flight at once;
// 0 past the chunk's end. `at` is the chunk's first token.
template <class Stored, int kTokens, int kStep>
MAMBA2_DEVICE void load_dt_as(const void* dt, int64_t at, int64_t stride, int first, int count,
                              float (&r_dt)[kTokens]) {
  MAMBA2_UNROLL for (int k = 0; k < kTokens; ++k) {
    const int t = first + k * kStep;
    r_dt[k] = t < count ? convert<float>(static_cast<const Stored*>(dt)[at + t * stride]) : 0.f;
  }
}
template <int kTokens, int kStep>
MAMBA2_DEVICE void load_dt(const StepInputs& in, int row, int token, int i_h, int first, int count,
                           float (&r_dt)[kTokens]) {
  const int64_t at = row * in.dt.b + token * in.dt.l + i_h * in.dt.h;
  switch (in.dt_dtype) {
    case DType::f64:
      load_dt_as<double, kTokens, kStep>(in.dt.ptr, at, in.dt.l, first, count, r_dt);
      break;
    case DType::f32:
      load_dt_as<float, kTokens, kStep>(in.dt.ptr, at, in.dt.l, first, count, r_dt);
      break;
    case DType::bf16:
      load_dt_as<bf16, kTokens, kStep>(in.dt.ptr, at, in.dt.l, first, count, r_dt);
      break;
    case DType::f16:
      load_dt_as<f16, kTokens, kStep>(in.dt.ptr, at, in.dt.l, first, count, r_dt);
      break;
  }
}

// A number as it lies in memory, so that nothing waits for the load until float_of_bits.
MAMBA2_DEVICE uint32_t load_bits(const void* from, DType dtype, int64_t at) {
  if (size_of(dtype) == 2) return static_cast<const uint16_t*>(from)[at];
  if (dtype == DType::f32) return static_cast<const uint32_t*>(from)[at];
  const float number = static_cast<float>(static_cast<const double*>(from)[at]);
  uint32_t bits;
  __builtin_memcpy(&bits, &number, sizeof(bits));
  return bits;
}
MAMBA2_DEVICE float float_of_bits(DType dtype, uint32_t bits) {
  if (dtype == DType::f16) return unpack2<f16>(bits).x;
  if (dtype == DType::bf16) bits <<= 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof(number));
  return number;
}

// Whether the sequence of runs in seq_idx starts anew at this token of the row.
MAMBA2_DEVICE bool resets(const StepInputs& in, int row, int token) {
  if (in.seq_idx == nullptr || token == 0) return false;
  const int* seq_idx = in.seq_idx + row * in.l + token;
  return seq_idx[0] != seq_idx[-1];
}

struct Step {
  float delta, a_log2;
};
// A token at which seq_idx changes gets log2 decay -160, which is 0 in fp32: the state resets
// there, and no later stage knows of seq_idx.
MAMBA2_DEVICE Step step_of(const StepInputs& in, float dt, float bias, float A, bool reset) {
  const float delta = delta_of(dt, bias, in.dt_softplus, in.dt_min, in.dt_max).value;
  return {delta, reset ? static_cast<float>(kMinDecayLog2) : decay_log2(delta, A)};
}
// The same with the fast softplus and selects: nothing branches, so that several tokens of a thread
// take their steps side by side.
MAMBA2_DEVICE Step fast_step_of(const StepInputs& in, float dt, float bias, float A, bool reset) {
  const float v = dt + bias, soft = fast::softplus(v), raw = in.dt_softplus ? soft : v;
  const float bounded = raw < in.dt_min ? in.dt_min : raw;
  const float delta = bounded > in.dt_max ? in.dt_max : bounded, a = decay_log2(delta, A);
  return {delta, reset ? static_cast<float>(kMinDecayLog2) : a};
}

// The sum over the lanes up to this one.
template <class Sum>
MAMBA2_DEVICE Sum inclusive_sum(Sum sum, int lane) {
  MAMBA2_UNROLL for (int d = 1; d < 32; d *= 2) {
    const Sum left = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += left;
  }
  return sum;
}

}  // namespace mamba2::ssd
