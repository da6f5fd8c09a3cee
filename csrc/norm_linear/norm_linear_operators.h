// The operators as csrc/ops.cpp declares them: each checks, and runs what was prepared by the
// function of its device.
#pragma once
#include "../core/nvtx.h"
#include "norm_linear_call.h"

namespace mamba2::norm_linear {

template <auto kRun>
Tensor norm_linear_operator(Tensor x, Tensor norm_weight, OptionalTensor z, Tensor weight,
                            OptionalTensor bias, OptionalTensor residual, double eps,
                            int64_t group_size, bool norm_before_gate, bool early_weights) {
  const Range range("norm_linear");
  const Call call = prepare({x, norm_weight, z, weight, bias, residual, eps, group_size,
                             norm_before_gate, early_weights});
  kRun(call, x);
  return call.y;
}

template <auto kRun>
Tensor norm_linear_add_norm_operator(Tensor residual, Tensor x, Tensor norm_weight,
                                     OptionalTensor z, Tensor weight, OptionalTensor bias,
                                     Tensor next_weight, double eps, int64_t group_size,
                                     bool norm_before_gate, double next_eps, int64_t dtype,
                                     bool early_weights) {
  const Range range("norm_linear_add_norm_");
  const CallWithNorm call = prepare_with_norm(
      {x, norm_weight, z, weight, bias, residual, eps, group_size, norm_before_gate, early_weights},
      next_weight, next_eps, dtype);
  kRun(call, x);
  return call.next.y;
}

template <auto kRun>
Tensor linear_rows_operator(Tensor x, Tensor weight, OptionalTensor conv_state,
                            OptionalTensor conv_weight, OptionalTensor conv_bias,
                            int64_t conv_first, bool silu, bool early_weights) {
  const Range range("linear_rows");
  const RowsCall call = prepare_rows(
      {x, weight, conv_state, conv_weight, conv_bias, conv_first, silu, early_weights});
  kRun(call, x);
  return call.y;
}

}  // namespace mamba2::norm_linear
