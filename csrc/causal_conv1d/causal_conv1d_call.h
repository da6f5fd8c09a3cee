// One call of causal_conv1d, ready to run on any device: the checked arguments, and the outputs.
#pragma once
#include <tuple>

#include "../core/host.h"
#include "causal_conv1d.h"

namespace mamba2::causal_conv1d {

struct Arguments {
  Tensor x, weight;
  OptionalTensor bias, initial_states, cu_seqlens;
  bool silu = false;
  OptionalTensor y;  // of x's shape, contiguous: where the forward writes, if not to a new tensor
};

struct ForwardCall {
  ForwardParams params;
  Tensor y, final_states;    // final_states undefined where not asked for
  std::vector<Tensor> kept;  // copies that params point into
};
ForwardCall prepare_forward(const Arguments& arguments, bool return_final_states);

struct BackwardCall {
  BackwardParams params;
  Tensor dx, dweight, dbias, d_initial_states;  // undefined: absent, or written to a destination
  std::vector<Tensor> kept;
  OptionalTensor destination;  // of dx, where kernels cannot write it in place
  Tensor written;              // ... and what to copy there

  // To be called when the gradients are written (or their kernels launched).
  void finish();
};
BackwardCall prepare_backward(const Tensor& dy, const OptionalTensor& d_final_states,
                              const Arguments& arguments, const OptionalTensor& dx);

struct StepCall {
  StepParams params;
  Tensor y;
  std::vector<Tensor> kept;
};
StepCall prepare_step(const Tensor& state, const Tensor& x, const Tensor& weight,
                      const OptionalTensor& bias, bool silu, const OptionalTensor& state_indices);

using ForwardResult = std::tuple<Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// What the operator returns of them.
inline BackwardResult defined(const BackwardResult& result, const Tensor& x) {
  const auto& [dx, dweight, dbias, d_initial_states] = result;
  const DType dtype = dtype_of(x), state = state_dtype(dtype);
  return {or_absent(dx, state, x), dweight, or_absent(dbias, state, x),
          or_absent(d_initial_states, dtype, x)};
}

// The forward on one kind of device: y, and the final states, undefined where not asked for.
ForwardResult forward_on_cpu(const Arguments& arguments, bool return_final_states);
ForwardResult forward_on_cuda(const Arguments& arguments, bool return_final_states);
// The backward operator on one kind of device.
BackwardResult backward_on_cpu(const Tensor& dy, const OptionalTensor& d_final_states,
                               const Arguments& arguments, const OptionalTensor& dx);
BackwardResult backward_on_cuda(const Tensor& dy, const OptionalTensor& d_final_states,
                                const Arguments& arguments, const OptionalTensor& dx);

// The operators as csrc/ops.cpp declares them, of a device's forward and backward.
template <auto kForward>
ForwardResult forward_operator(Tensor x, Tensor weight, OptionalTensor bias,
                               OptionalTensor initial_states, OptionalTensor cu_seqlens, bool silu,
                               bool return_final_states) {
  auto [y, final_states] =
      kForward({x, weight, bias, initial_states, cu_seqlens, silu}, return_final_states);
  if (!return_final_states) final_states = allocate(Sizes{0}, x.scalar_type(), x);
  return {y, final_states};
}
template <auto kBackward>
BackwardResult backward_operator(Tensor dy, OptionalTensor d_final_states, Tensor x, Tensor weight,
                                 OptionalTensor bias, OptionalTensor initial_states,
                                 OptionalTensor cu_seqlens, bool silu, OptionalTensor dx) {
  return defined(
      kBackward(dy, d_final_states, {x, weight, bias, initial_states, cu_seqlens, silu}, dx), x);
}

}  // namespace mamba2::causal_conv1d
