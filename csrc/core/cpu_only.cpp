// A CPU-only build meets a CUDA tensor: every operator says so, and how to build it.
#include "host.h"

#if !MAMBA2_WITH_CUDA
namespace mamba2 {
namespace {

constexpr const char* kOperators[] = {
    "ssd_scan_forward",
    "ssd_scan_backward",
    "ssd_scan_backward_out",
    "ssd_segment_state_forward",
    "ssd_segment_state_backward",
    "ssd_step",
    "causal_conv1d_forward",
    "causal_conv1d_backward",
    "causal_conv1d_step",
    "gated_rmsnorm_forward",
    "gated_rmsnorm_backward",
    "conv_scan_norm_forward",
    "conv_scan_norm_backward",
    "mixer_forward",
    "norm_linear",
    "norm_linear_add_norm_",
    "linear_rows",
    "add_norm_forward",
    "add_norm_backward",
    "add_norm_",
    "cross_entropy_forward",
    "cross_entropy_backward",
};

void refuse(StableIValue*, uint64_t, uint64_t) {
  fail(
      "mamba2_cuda: this build is for the CPU alone, and the tensors are on a CUDA device; build "
      "it where nvcc is found, or set CUDA_HOME (docs/building.md)");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CUDA, m) {
  for (const char* name : kOperators) m.impl(name, &refuse);
}

}  // namespace mamba2
#endif
