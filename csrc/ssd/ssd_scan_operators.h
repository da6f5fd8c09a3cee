// The operators' functions as csrc/ops.cpp declares them, argument by argument, for every device:
// they pack the arguments and hand them to a Device, which has
//   ForwardResult forward(arguments, return_final_states, save_states, plan)    undefined: nothing
//   BackwardResult backward(operator's name, arguments, gradients, plan)        the same
//   std::tuple<Tensor, Tensor> segment_state(arguments, plan)       state, log_decay
#pragma once
#include "ssd_call.h"

namespace mamba2::ssd {

template <class Device>
struct ScanOperators {
  static ForwardResult scan_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                                    OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias,
                                    OptionalTensor initial_states, OptionalTensor cu_seqlens,
                                    OptionalTensor seq_idx, bool dt_softplus, double dt_min,
                                    double dt_max, bool return_final_states, bool save_states,
                                    int64_t plan) {
    const ScanArguments arguments{
        x,          dt,      A,           B,      C,     D, z, dt_bias, initial_states,
        cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max};
    const auto [y, final_states, kept] =
        Device::forward(arguments, return_final_states, save_states, static_cast<int>(plan));
    const DType dtype = dtype_of(x);
    return {y, or_absent(final_states, state_dtype(dtype), x), or_absent(kept, dtype, x)};
  }

  static BackwardResult scan_backward_out(Tensor dy, OptionalTensor d_final_states, Tensor x,
                                          Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                          OptionalTensor z, OptionalTensor dt_bias,
                                          OptionalTensor initial_states, OptionalTensor cu_seqlens,
                                          OptionalTensor seq_idx, OptionalTensor chunk_states,
                                          bool dt_softplus, double dt_min, double dt_max,
                                          int64_t plan, OptionalTensor dx, OptionalTensor d_dt,
                                          OptionalTensor dB, OptionalTensor dC, OptionalTensor dz) {
    const ScanArguments arguments{
        x,          dt,      A,           B,      C,     D, z, dt_bias, initial_states,
        cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max};
    const GradientArguments gradients{dy, d_final_states, {}, chunk_states, dx, d_dt, dB, dC, dz};
    return defined(
        Device::backward("ssd_scan_backward", arguments, gradients, static_cast<int>(plan)), x);
  }

  static BackwardResult scan_backward(Tensor dy, OptionalTensor d_final_states, Tensor x, Tensor dt,
                                      Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                      OptionalTensor z, OptionalTensor dt_bias,
                                      OptionalTensor initial_states, OptionalTensor cu_seqlens,
                                      OptionalTensor seq_idx, OptionalTensor chunk_states,
                                      bool dt_softplus, double dt_min, double dt_max,
                                      int64_t plan) {
    return scan_backward_out(dy, d_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states,
                             cu_seqlens, seq_idx, chunk_states, dt_softplus, dt_min, dt_max, plan,
                             {}, {}, {}, {}, {});
  }

  static std::tuple<Tensor, Tensor> segment_state_forward(Tensor x, Tensor dt, Tensor A, Tensor B,
                                                          OptionalTensor dt_bias, bool dt_softplus,
                                                          double dt_min, double dt_max,
                                                          int64_t plan) {
    return Device::segment_state(
        segment_arguments(x, dt, A, B, dt_bias, dt_softplus, dt_min, dt_max),
        static_cast<int>(plan));
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> segment_state_backward(
      Tensor d_state, Tensor d_log_decay, Tensor x, Tensor dt, Tensor A, Tensor B,
      OptionalTensor dt_bias, bool dt_softplus, double dt_min, double dt_max, int64_t plan) {
    GradientArguments gradients;
    gradients.d_final_states = d_state;
    gradients.d_log_decay = d_log_decay;
    const auto [dx, d_dt, dA, dB, dC, dD, dz, d_dt_bias, d_initial_states] = defined(
        Device::backward("ssd_segment_state_backward",
                         segment_arguments(x, dt, A, B, dt_bias, dt_softplus, dt_min, dt_max),
                         gradients, static_cast<int>(plan)),
        x);
    return {dx, d_dt, dA, dB, d_dt_bias};
  }

 private:
  static BackwardResult defined(const BackwardResult& result, const Tensor& x) {
    const DType dtype = state_dtype(dtype_of(x));
    return std::apply(
        [&](const auto&... gradients) { return BackwardResult{or_absent(gradients, dtype, x)...}; },
        result);
  }
  static ScanArguments segment_arguments(Tensor x, Tensor dt, Tensor A, Tensor B,
                                         OptionalTensor dt_bias, bool dt_softplus, double dt_min,
                                         double dt_max) {
    ScanArguments arguments{x, dt, A, B};
    arguments.dt_bias = dt_bias;
    arguments.dt_softplus = dt_softplus;
    arguments.dt_min = dt_min;
    arguments.dt_max = dt_max;
    return arguments;
  }
};

// Registers them in a STABLE_TORCH_LIBRARY_IMPL block.
template <class Device, class Library>
void implement_scan_operators(Library& library) {
  using Operators = ScanOperators<Device>;
  library.impl("ssd_scan_forward", TORCH_BOX(&Operators::scan_forward));
  library.impl("ssd_scan_backward", TORCH_BOX(&Operators::scan_backward));
  library.impl("ssd_scan_backward_out", TORCH_BOX(&Operators::scan_backward_out));
  library.impl("ssd_segment_state_forward", TORCH_BOX(&Operators::segment_state_forward));
  library.impl("ssd_segment_state_backward", TORCH_BOX(&Operators::segment_state_backward));
}

}  // namespace mamba2::ssd
