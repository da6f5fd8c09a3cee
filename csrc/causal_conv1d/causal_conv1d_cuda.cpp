// causal_conv1d on a CUDA device: check, allocate, launch. The host emulation registers this file
// for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "causal_conv1d_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::causal_conv1d {
namespace {

void* pointer(const Tensor& scratch) {
  return scratch.numel() > 0 ? scratch.mutable_data_ptr() : nullptr;
}

bool has_no_token(const Shape& shape) { return shape.b == 0 || shape.l == 0; }

Tensor conv_step(Tensor state, Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                 OptionalTensor state_indices) {
  const StepCall call = prepare_step(state, x, weight, bias, silu, state_indices);
  const OnDevice at(x);
  at.check_launch("causal_conv1d_step", step(call.params, at.stream()));
  return call.y;
}

}  // namespace

ForwardResult forward_on_cuda(const Arguments& arguments, bool return_final_states) {
  const Range range("causal_conv1d");
  const ForwardCall call = prepare_forward(arguments, return_final_states);
  if (has_no_token(call.params.in.shape)) {  // the final states are the initial ones, or zeros
    fill(call.final_states, arguments.initial_states);
    return {call.y, call.final_states};
  }
  const OnDevice at(arguments.x);
  const std::size_t bytes = forward_workspace_bytes(call.params.in.shape);
  const Tensor scratch = bytes ? allocate_bytes(int64_t(bytes), arguments.x) : Tensor();
  at.check_launch("causal_conv1d", forward(call.params, pointer(scratch), at.stream()));
  return {call.y, call.final_states};
}

BackwardResult backward_on_cuda(const Tensor& dy, const OptionalTensor& d_final_states,
                                const Arguments& arguments, const OptionalTensor& dx) {
  const Range range("causal_conv1d_backward");
  BackwardCall call = prepare_backward(dy, d_final_states, arguments, dx);
  const BackwardResult result{call.dx, call.dweight, call.dbias, call.d_initial_states};
  const Inputs& in = call.params.in;
  if (has_no_token(in.shape)) {
    fill(call.dweight, std::nullopt);
    fill(call.dbias, std::nullopt);
    fill(call.d_initial_states, d_final_states);
    return result;
  }
  const OnDevice at(arguments.x);
  const auto bytes = static_cast<int64_t>(backward_workspace_bytes(in.shape, in.dtype));
  const Tensor scratch = allocate_bytes(bytes, arguments.x);
  at.check_launch("causal_conv1d_backward", backward(call.params, pointer(scratch), at.stream()));
  call.finish();
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward_operator<forward_on_cuda>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward_operator<backward_on_cuda>));
  m.impl("causal_conv1d_step", TORCH_BOX(&conv_step));
}

}  // namespace mamba2::causal_conv1d
