// The CPU implementations of ssd_scan and ssd_segment_state (csrc/ops.cpp has their schemas).
#include "ssd_scan_cpu.h"

#include "ssd_scan_operators.h"

namespace mamba2::ssd {
namespace {

// A plan chooses kernels; the CPU has one way, which is batch invariant and keeps no chunk states.
struct Cpu {
  static ForwardResult forward(const ScanArguments& arguments, bool return_final_states,
                               bool /*save_states*/, int /*plan*/) {
    const ForwardCall call = prepare_scan("ssd_scan", arguments, return_final_states);
    cpu::forward(call.params);
    return {call.y, call.final_states, Tensor()};
  }
  static BackwardResult backward(const char* op, const ScanArguments& arguments,
                                 const GradientArguments& gradients, int /*plan*/) {
    BackwardCall call = prepare_backward(op, arguments, gradients);
    cpu::backward(call.params);
    call.finish();
    return result_of(call);
  }
  static std::tuple<Tensor, Tensor> segment_state(const ScanArguments& arguments, int /*plan*/) {
    const ForwardCall call = prepare_segment_state("ssd_segment_state", arguments);
    cpu::forward(call.params);
    return {call.final_states, call.log_decay};
  }
};

}  // namespace

ForwardResult scan_forward_on_cpu(const ScanArguments& arguments, bool return_final_states,
                                  int plan) {
  return Cpu::forward(arguments, return_final_states, /*save_states=*/false, plan);
}

BackwardResult scan_backward_on_cpu(const ScanArguments& arguments,
                                    const GradientArguments& gradients, int plan) {
  return Cpu::backward("ssd_scan_backward", arguments, gradients, plan);
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) { implement_scan_operators<Cpu>(m); }

}  // namespace mamba2::ssd
