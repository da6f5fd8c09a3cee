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

// The same of a small array: most are fp32.
MAMBA2_DEVICE uint32_t load_bits_of(const AnyFloat& array, int i) {
  if (!array) return 0;
  if (array.dtype == DType::f32) return static_cast<const uint32_t*>(array.ptr)[i];
  return load_bits(array.ptr, array.dtype, i);
}

// Whether the sequence of runs in seq_idx (b, l), if there is one, starts anew at this token of the
// row.
MAMBA2_DEVICE bool resets(const int* seq_idx, int64_t l, int row, int token) {
  if (seq_idx == nullptr || token == 0) return false;
  seq_idx += row * l + token;
  return seq_idx[0] != seq_idx[-1];
}
MAMBA2_DEVICE bool resets(const StepInputs& in, int row, int token) {
  return resets(in.seq_idx, in.l, row, token);
}

// delta, from dt + dt_bias and its softplus. By selects: nothing branches, so that several tokens
// of a thread take their steps side by side.
MAMBA2_DEVICE float bounded_delta(const StepInputs& in, float v, float soft) {
  const float raw = in.dt_softplus ? soft : v, bounded = raw < in.dt_min ? in.dt_min : raw;
  return bounded > in.dt_max ? in.dt_max : bounded;
}
struct Step {
  float delta, a_log2;
};
// A token at which seq_idx changes gets log2 decay -160, which is 0 in fp32: the state resets
// there, and later stages need not know of seq_idx.
MAMBA2_DEVICE Step fast_step_of(const StepInputs& in, float dt, float bias, float A, bool reset) {
  const float v = dt + bias, delta = bounded_delta(in, v, fast::quick_softplus(v));
  const float a = decay_log2(delta, A);
  return {delta, reset ? static_cast<float>(kMinDecayLog2) : a};
}

// The sum over the lanes up to this one, of each kLanes in a row; `lane` counts within them.
template <int kLanes = 32, class Sum>
MAMBA2_DEVICE Sum inclusive_sum(Sum sum, int lane) {
  MAMBA2_UNROLL for (int d = 1; d < kLanes; d *= 2) {
    const Sum left = __shfl_up_sync(~0u, sum, d, kLanes);
    if (lane >= d) sum += left;
  }
  return sum;
}

}  // namespace mamba2::ssd
