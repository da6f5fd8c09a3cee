// The CPU implementations of ssd_scan and ssd_segment_state (csrc/ops.cpp has their schemas).
#include "ssd_scan_cpu.h"

#include "ssd_call.h"

namespace mamba2::ssd {
namespace {

// A plan chooses kernels; the CPU has one way, which is batch invariant and keeps no chunk states.
ForwardResult ssd_scan_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                               OptionalTensor z, OptionalTensor dt_bias,
                               OptionalTensor initial_states, OptionalTensor cu_seqlens,
                               OptionalTensor seq_idx, bool dt_softplus, double dt_min,
                               double dt_max, bool return_final_states, bool /*save_states*/,
                               int64_t /*plan*/) {
  const ScanArguments arguments{
      x,          dt,      A,           B,      C,     D, z, dt_bias, initial_states,
      cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max};
  const ForwardCall call = prepare_scan("ssd_scan", arguments, return_final_states);
  cpu::forward(call.params);
  return {call.y, call.final_states, absent(call.params.in.dtype, x)};
}

BackwardResult ssd_scan_backward_out(Tensor dy, OptionalTensor d_final_states, Tensor x, Tensor dt,
                                     Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                     OptionalTensor z, OptionalTensor dt_bias,
                                     OptionalTensor initial_states, OptionalTensor cu_seqlens,
                                     OptionalTensor seq_idx, OptionalTensor chunk_states,
                                     bool dt_softplus, double dt_min, double dt_max,
                                     int64_t /*plan*/, OptionalTensor dx, OptionalTensor d_dt,
                                     OptionalTensor dB, OptionalTensor dC, OptionalTensor dz) {
  const ScanArguments arguments{
      x,          dt,      A,           B,      C,     D, z, dt_bias, initial_states,
      cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max};
  const GradientArguments gradients{dy, d_final_states, {}, chunk_states, dx, d_dt, dB, dC, dz};
  BackwardCall call = prepare_backward("ssd_scan_backward", arguments, gradients);
  cpu::backward(call.params);
  call.finish();
  return result_of(call);
}

BackwardResult ssd_scan_backward(Tensor dy, OptionalTensor d_final_states, Tensor x, Tensor dt,
                                 Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                 OptionalTensor dt_bias, OptionalTensor initial_states,
                                 OptionalTensor cu_seqlens, OptionalTensor seq_idx,
                                 OptionalTensor chunk_states, bool dt_softplus, double dt_min,
                                 double dt_max, int64_t plan) {
  return ssd_scan_backward_out(dy, d_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states,
                               cu_seqlens, seq_idx, chunk_states, dt_softplus, dt_min, dt_max, plan,
                               {}, {}, {}, {}, {});
}

std::tuple<Tensor, Tensor> ssd_segment_state_forward(Tensor x, Tensor dt, Tensor A, Tensor B,
                                                     OptionalTensor dt_bias, bool dt_softplus,
                                                     double dt_min, double dt_max,
                                                     int64_t /*plan*/) {
  const ScanArguments arguments{x,       dt, A,  B,  {},          {},     {},
                                dt_bias, {}, {}, {}, dt_softplus, dt_min, dt_max};
  const ForwardCall call = prepare_segment_state("ssd_segment_state", arguments);
  cpu::forward(call.params);
  return {call.final_states, call.log_decay};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ssd_segment_state_backward(
    Tensor d_state, Tensor d_log_decay, Tensor x, Tensor dt, Tensor A, Tensor B,
    OptionalTensor dt_bias, bool dt_softplus, double dt_min, double dt_max, int64_t /*plan*/) {
  const ScanArguments arguments{x,       dt, A,  B,  {},          {},     {},
                                dt_bias, {}, {}, {}, dt_softplus, dt_min, dt_max};
  const GradientArguments gradients{{}, d_state, d_log_decay, {}, {}, {}, {}, {}, {}};
  BackwardCall call = prepare_backward("ssd_segment_state_backward", arguments, gradients);
  cpu::backward(call.params);
  call.finish();
  return {call.dx, call.d_dt, call.dA, call.dB, call.d_dt_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("ssd_scan_forward", TORCH_BOX(&ssd_scan_forward));
  m.impl("ssd_scan_backward", TORCH_BOX(&ssd_scan_backward));
  m.impl("ssd_scan_backward_out", TORCH_BOX(&ssd_scan_backward_out));
  m.impl("ssd_segment_state_forward", TORCH_BOX(&ssd_segment_state_forward));
  m.impl("ssd_segment_state_backward", TORCH_BOX(&ssd_segment_state_backward));
}

}  // namespace mamba2::ssd
