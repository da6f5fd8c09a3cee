// cross_entropy on a CUDA device: check, allocate, launch. The host emulation registers this file
// for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "cross_entropy_call.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::cross_entropy {
namespace {

Tensor forward(Tensor logits, Tensor targets, OptionalTensor scale) {
  const Range range("cross_entropy");
  const Call call = prepare(logits, targets, scale);
  const OnDevice at(logits);
  at.check_launch("cross_entropy", run(call.params, at.stream()));
  return call.losses;
}

void backward(Tensor gradient, Tensor d_loss) {
  const Range range("cross_entropy_backward");
  const ScaleParams params = prepare_scale(gradient, d_loss);
  const OnDevice at(gradient);
  at.check_launch("cross_entropy_backward", mamba2::cross_entropy::scale(params, at.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace mamba2::cross_entropy
