// The contract of ssd_scan and ssd_segment_state (docs/ssd.md), checked once for every device.
#pragma once
#include "../core/host.h"
#include "shape.h"

namespace mamba2::ssd {

// What both directions are given, as given. ssd_segment_state has no C, D, z, states or sequences.
struct ScanArguments {
  Tensor x, dt, A, B;
  OptionalTensor C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx;
  bool dt_softplus = false;
  double dt_min = 0, dt_max = 0;
  OptionalTensor y;  // of x's shape, contiguous: where the forward writes, if not to a new tensor
};

// What the backward is given beside it. dx .. dz: destinations that the caller wants filled.
struct GradientArguments {
  OptionalTensor dy, d_final_states, d_log_decay, chunk_states;
  OptionalTensor dx, d_dt, dB, dC, dz;
};

// Throws unless the arguments keep the contract; returns their sizes.
Shape check_scan(const char* op, const ScanArguments& arguments);
// Arguments that passed check_scan, and the gradients that belong to them.
void check_gradients(const char* op, const ScanArguments& arguments, const Shape& shape,
                     const GradientArguments& gradients);

}  // namespace mamba2::ssd
