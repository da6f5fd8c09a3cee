// One call of the operator, ready to run on any device: the checked arguments, the parameters that
// point into them, and the outputs.
#pragma once
#include <tuple>
#include <utility>

#include "params.h"
#include "ssd_checks.h"

namespace mamba2::ssd {

struct ForwardCall {
  ForwardParams params;      // y and chunk_states null: not asked for
  Tensor y;                  // (b, l, h, p)
  Tensor final_states;       // (nseq, h, p, n), undefined where not asked for
  Tensor log_decay;          // (b, h), of a segment
  std::vector<Tensor> kept;  // copies that params point into
};

// Checks, copies what cannot be read in place, allocates. `op` is the name in messages.
ForwardCall prepare_scan(const char* op, const ScanArguments& arguments, bool return_final_states);
ForwardCall prepare_segment_state(const char* op, const ScanArguments& arguments);

struct BackwardCall {
  BackwardParams params;
  // Absent ones, and those written into a destination, are undefined.
  Tensor dx, d_dt, dA, dB, dC, dD, dz, d_dt_bias, d_initial_states;
  std::vector<Tensor> kept;
  // Destinations that kernels cannot write in place, and the tensors to copy there at the end.
  std::vector<std::pair<Tensor, Tensor>> deferred;

  // To be called when the gradients are written (or their kernels launched).
  void finish();
};

BackwardCall prepare_backward(const char* op, const ScanArguments& arguments,
                              const GradientArguments& gradients);

// The operators' signatures (csrc/ops.cpp), shared by the devices' registrations.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// ssd_scan's forward on one kind of device: y, the final states and what is kept for the backward,
// which is nothing here. Undefined where not asked for.
ForwardResult scan_forward_on_cpu(const ScanArguments& arguments, bool return_final_states,
                                  int plan);
ForwardResult scan_forward_on_cuda(const ScanArguments& arguments, bool return_final_states,
                                   int plan);

// ssd_scan's backward on one kind of device.
BackwardResult scan_backward_on_cpu(const ScanArguments& arguments,
                                    const GradientArguments& gradients, int plan);
BackwardResult scan_backward_on_cuda(const ScanArguments& arguments,
                                     const GradientArguments& gradients, int plan);

inline BackwardResult result_of(const BackwardCall& call) {
  return {call.dx, call.d_dt,      call.dA,
          call.dB, call.dC,        call.dD,
          call.dz, call.d_dt_bias, call.d_initial_states};
}

}  // namespace mamba2::ssd
