// norm_linear on a CUDA device: check, allocate, launch. The host emulation registers this file
// for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "norm_linear_add_norm.h"
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

Tensor norm_linear_add_norm(Tensor residual, Tensor x, Tensor norm_weight, OptionalTensor z,
                            Tensor weight, OptionalTensor bias, Tensor next_weight, double eps,
                            int64_t group_size, bool norm_before_gate, double next_eps,
                            int64_t dtype, bool early_weights) {
  const Range range("norm_linear_add_norm_");
  const auto [product, next] = prepare_with_norm(
      {x, norm_weight, z, weight, bias, residual, eps, group_size, norm_before_gate, early_weights},
      next_weight, next_eps, dtype);
  const OnDevice at(x);
  if (x.size(0) > 0 && fits_rows(product.params, next.params)) {
    const auto bytes = static_cast<int64_t>(rows_workspace_bytes(product.params));
    const Tensor scratch = allocate_bytes(bytes, x);
    at.check_launch("norm_linear_add_norm_",
                    run_rows(product.params, next.params, scratch.mutable_data_ptr(), at.stream()));
  } else {
    at.check_launch("norm_linear", run(product.params, at.stream()));
    at.check_launch("add_norm", add_norm::forward(next.params, at.stream()));
  }
  return next.y;
}

Tensor linear_rows(Tensor x, Tensor weight, OptionalTensor conv_state, OptionalTensor conv_weight,
                   OptionalTensor conv_bias, int64_t conv_first, bool silu, bool early_weights) {
  const Range range("linear_rows");
  const RowsCall call = prepare_rows(
      {x, weight, conv_state, conv_weight, conv_bias, conv_first, silu, early_weights});
  const OnDevice at(x);
  at.check_launch("linear_rows", run_linear_rows(call.params, call.conv, at.stream()));
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("norm_linear", TORCH_BOX(&norm_linear));
  m.impl("norm_linear_add_norm_", TORCH_BOX(&norm_linear_add_norm));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}

}  // namespace mamba2::norm_linear
