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
  static constexpr auto conv_backward = causal_conv1d::backward_on_cpu;
  static constexpr auto scan_backward = ssd::scan_backward_on_cpu;
  static constexpr auto norm_backward = gated_rmsnorm::backward_on_cpu;

  static void write_decay_rates(const Tensor& A_log, const Tensor& A) {
    for (int64_t i_h = 0; i_h < A.size(0); ++i_h) {
      const double rate = decay_rate(cpu::load<double>(any_float(A_log), i_h));
      cpu::store(dtype_of(A), A.mutable_data_ptr(), i_h, rate);
    }
  }
  static void scale_by_rates(const Tensor& A, const Tensor& dA) {
    for (int64_t i_h = 0; i_h < A.size(0); ++i_h) {
      const double gradient = cpu::load<double>(any_float(dA), i_h);
      const double rate = cpu::load<double>(any_float(A), i_h);
      cpu::store(dtype_of(dA), dA.mutable_data_ptr(), i_h, gradient * rate);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("conv_scan_norm_forward", TORCH_BOX(&forward<Cpu>));
  m.impl("conv_scan_norm_backward", TORCH_BOX(&backward<Cpu>));
  m.impl("mixer_forward", TORCH_BOX(&mixer<Cpu>));
}

}  // namespace mamba2::conv_scan_norm
