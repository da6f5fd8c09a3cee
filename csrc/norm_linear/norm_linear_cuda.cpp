// norm_linear and its kin on a CUDA device: allocate, launch. The host emulation registers this
// file for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "norm_linear_add_norm.h"
#include "norm_linear_operators.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::norm_linear {
namespace {

void run_norm_linear(const Call& call, const Tensor& x) {
  const OnDevice at(x);
  at.check_launch("norm_linear", run(call.params, at.stream()));
}

void run_with_norm(const CallWithNorm& call, const Tensor& x) {
  const auto& [product, next] = call;
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
}

void run_rows_call(const RowsCall& call, const Tensor& x) {
  const OnDevice at(x);
  at.check_launch("linear_rows",
                  run_linear_rows(call.params, call.conv, at.card().max_smem_bytes, at.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("norm_linear", TORCH_BOX(&norm_linear_operator<run_norm_linear>));
  m.impl("norm_linear_add_norm_", TORCH_BOX(&norm_linear_add_norm_operator<run_with_norm>));
  m.impl("linear_rows", TORCH_BOX(&linear_rows_operator<run_rows_call>));
}

}  // namespace mamba2::norm_linear
