// add_norm on a CUDA device: check, allocate, launch. The host emulation registers this file for
// CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "add_norm_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::add_norm {
namespace {

void run_forward(const ForwardCall& call) {
  const OnDevice at(call.y);
  at.check_launch("add_norm", forward(call.params, at.stream()));
}

Tensor norm_in_place(Tensor residual, OptionalTensor x, Tensor weight, double eps, int64_t dtype) {
  const Range range("add_norm_");
  const ForwardCall call = prepare_in_place(residual, x, weight, eps, dtype);
  run_forward(call);
  return call.y;
}

ForwardResult norm_forward(Tensor residual, OptionalTensor x, Tensor weight, double eps,
                           int64_t dtype) {
  const Range range("add_norm");
  const ForwardCall call = prepare_forward(residual, x, weight, eps, dtype);
  run_forward(call);
  return {call.residual_out, call.y};
}

BackwardResult norm_backward(Tensor dy, OptionalTensor d_residual_out, Tensor residual_out,
                             Tensor weight, double eps, int64_t x_dtype) {
  const Range range("add_norm_backward");
  BackwardCall call = prepare_backward(dy, d_residual_out, residual_out, weight, eps, x_dtype);
  const BackwardResult result{call.d_residual, call.dx, call.dweight};
  if (call.params.b == 0) {
    torch::stable::zero_(call.dweight);
    return result;
  }
  const OnDevice at(residual_out);
  const auto bytes = static_cast<int64_t>(backward_workspace_bytes(call.params));
  const Tensor scratch = allocate_bytes(bytes, residual_out);
  at.check_launch("add_norm_backward",
                  backward(call.params, scratch.mutable_data_ptr(), at.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("add_norm_", TORCH_BOX(&norm_in_place));
  m.impl("add_norm_forward", TORCH_BOX(&norm_forward));
  m.impl("add_norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace mamba2::add_norm
