// gated_rmsnorm on a CUDA device: check, allocate, launch. The host emulation registers this file
// for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "gated_rmsnorm_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::gated_rmsnorm {
namespace {

Tensor norm_forward(Tensor x, Tensor weight, OptionalTensor z, double eps, int64_t group_size,
                    bool norm_before_gate) {
  return forward_on_cuda({x, weight, z, eps, group_size, norm_before_gate});
}

BackwardResult norm_backward(Tensor dy, Tensor x, Tensor weight, OptionalTensor z, double eps,
                             int64_t group_size, bool norm_before_gate, OptionalTensor dx,
                             OptionalTensor dz) {
  return defined(backward_on_cuda(dy, {x, weight, z, eps, group_size, norm_before_gate}, dx, dz),
                 x);
}

}  // namespace

Tensor forward_on_cuda(const Arguments& arguments) {
  const Range range("gated_rmsnorm");
  const ForwardCall call = prepare_forward(arguments);
  const OnDevice at(arguments.x);
  at.check_launch("gated_rmsnorm", forward(call.params, at.stream()));
  return call.y;
}

BackwardResult backward_on_cuda(const Tensor& dy, const Arguments& arguments,
                                const OptionalTensor& dx, const OptionalTensor& dz) {
  const Range range("gated_rmsnorm_backward");
  BackwardCall call = prepare_backward(dy, arguments, dx, dz);
  const BackwardResult result{call.dx, call.dweight, call.dz};
  if (arguments.x.numel() == 0) {
    torch::stable::zero_(call.dweight);
    return result;
  }
  const OnDevice at(arguments.x);
  const auto bytes = static_cast<int64_t>(backward_workspace_bytes(call.params.in));
  const Tensor scratch = allocate_bytes(bytes, arguments.x);
  at.check_launch("gated_rmsnorm_backward",
                  backward(call.params, scratch.mutable_data_ptr(), at.stream()));
  call.finish();
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("gated_rmsnorm_forward", TORCH_BOX(&norm_forward));
  m.impl("gated_rmsnorm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace mamba2::gated_rmsnorm
