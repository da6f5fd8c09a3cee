// One decoding step: the recurrence for the next token, or T of them, from a state that is updated
// in place.
//   H_t = exp(delta_t A) H_{t-1} + delta_t x_t B_t^T;   y_t = (H_t C_t + D x_t) silu(z_t)
#pragma once
#include "../core/macros.h"
#include "params.h"

namespace mamba2::ssd {

struct StepParams {
  Inputs in;              // l is T; no initial states, no sequences
  void* state = nullptr;  // (slots, h, p, n) state_dtype, in place
  DType state_dtype = DType::f32;
  int64_t slots = 0, slot_stride = 0;      // elements from slot to slot; (h, p, n) is contiguous
  const int* state_indices = nullptr;      // (b) where a state is read, optional: i_b
  const int* out_state_indices = nullptr;  // (b) where it is written, optional: where it was read
  void* y = nullptr;                       // (b, T, h, p) dtype, contiguous
  bool early_state = false;                // the kernel in front writes neither state nor indices
};

// Where the state of batch entry i_b is read and written; negative: padding, or no such slot.
struct StepSlots {
  int64_t source, target;
};
MAMBA2_HD StepSlots slots_of(const StepParams& params, int64_t i_b) {
  const auto valid = [&](int64_t slot) { return slot < params.slots ? slot : -1; };
  const int64_t source = valid(params.state_indices ? params.state_indices[i_b] : i_b);
  const int64_t target = params.out_state_indices ? valid(params.out_state_indices[i_b]) : source;
  return {source, target};
}

// Each returns a cudaError_t as int. ssd_step_any takes what ssd_step has no faster kernel for.
int ssd_step(const StepParams&, void* stream);
int ssd_step_any(const StepParams&, void* stream);

}  // namespace mamba2::ssd
