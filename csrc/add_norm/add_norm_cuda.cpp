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

Tensor add_norm(Tensor residual, OptionalTensor x, Tensor weight, double eps) {
  const Range range("add_norm");
  const Call call = prepare(residual, x, weight, eps);
  const OnDevice at(residual);
  at.check_launch("add_norm", run(call.params, at.stream()));
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("add_norm", TORCH_BOX(&add_norm));
}

}  // namespace mamba2::add_norm
