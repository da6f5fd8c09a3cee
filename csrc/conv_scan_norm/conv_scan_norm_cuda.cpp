// conv_scan_norm on a CUDA device. The host emulation registers this file for CPU tensors, in a
// namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "conv_scan_norm.h"
#include "conv_scan_norm_operator.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::conv_scan_norm {
namespace {

struct Cuda {
  static constexpr auto conv = causal_conv1d::forward_on_cuda;
  static constexpr auto scan = ssd::scan_forward_on_cuda;
  static constexpr auto norm = gated_rmsnorm::forward_on_cuda;
  static constexpr auto conv_backward = causal_conv1d::backward_on_cuda;
  static constexpr auto scan_backward = ssd::scan_backward_on_cuda;
  static constexpr auto norm_backward = gated_rmsnorm::backward_on_cuda;

  static void write_decay_rates(const Tensor& A_log, const Tensor& A) {
    const OnDevice at(A);
    at.check_launch("conv_scan_norm",
                    conv_scan_norm::decay_rates(any_float(A_log), static_cast<int>(A.size(0)),
                                                A.mutable_data_ptr(), dtype_of(A), at.stream()));
  }
  static void scale_by_rates(const Tensor& A, const Tensor& dA) {
    const OnDevice at(A);
    at.check_launch(
        "conv_scan_norm_backward",
        conv_scan_norm::scale_by_rates(any_float(A), static_cast<int>(A.size(0)),
                                       dA.mutable_data_ptr(), dtype_of(dA), at.stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  m.impl("conv_scan_norm_forward", TORCH_BOX(&forward<Cuda>));
  m.impl("conv_scan_norm_backward", TORCH_BOX(&backward<Cuda>));
  m.impl("mixer_forward", TORCH_BOX(&mixer<Cuda>));
}

}  // namespace mamba2::conv_scan_norm
