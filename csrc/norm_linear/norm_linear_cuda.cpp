// norm_linear on a CUDA device: check, allocate, launch. The host emulation registers this file
// for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "norm_linear_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::norm_linear {
namespace {

Tensor norm_linear(Tensor x, Tensor norm_weight, OptionalTensor z, Tensor weight,
                   OptionalTensor bias, OptionalTensor residual, double eps, int64_t group_size,
                   bool norm_before_gate, bool early_weights) {
  const Range range("norm_linear");
  const Call call = prepare({x, norm_weight, z, weight, bias, residual, eps, group_size,
                             norm_before_gate, early_weights});
  const OnDevice at(x);
  at.check_launch("norm_linear", run(call.params, at.stream()));
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("norm_linear", TORCH_BOX(&norm_linear));
}

}  // namespace mamba2::norm_linear
