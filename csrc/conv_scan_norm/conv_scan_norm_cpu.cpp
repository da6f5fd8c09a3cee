// conv_scan_norm on the CPU.
#include "../core/convert_cpu.h"
#include "conv_scan_norm.h"
#include "conv_scan_norm_operator.h"

namespace mamba2::conv_scan_norm {
namespace {

struct Cpu {
  static constexpr auto conv = causal_conv1d::forward_on_cpu;
  static constexpr auto scan = ssd::scan_forward_on_cpu;
  static constexpr auto norm = gated_rmsnorm::forward_on_cpu;

  static Tensor decay_rates(const Tensor& A_log) {
    const DType dtype = state_dtype(dtype_of(A_log));
    const Tensor from = compact(A_log), A = allocate(Sizes{A_log.size(0)}, dtype, A_log);
    for (int64_t i_h = 0; i_h < A_log.size(0); ++i_h) {
      const double rate = decay_rate(cpu::load<double>(any_float(from), i_h));
      cpu::store(dtype, A.mutable_data_ptr(), i_h, rate);
    }
    return A;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("conv_scan_norm_forward", TORCH_BOX(&forward<Cpu>));
}

}  // namespace mamba2::conv_scan_norm
