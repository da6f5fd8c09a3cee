// The entry points of the tiers: what ssd_scan_cuda.cpp calls. Each returns a cudaError_t as int.
// `workspace` is device memory of at least workspace_bytes, 1024-byte aligned, contents undefined.
#pragma once
#include <cstddef>

#include "params.h"
#include "plan.h"

namespace mamba2::ssd {

#define MAMBA2_SSD_TIER(tier)                                                                    \
  namespace tier {                                                                               \
  /* Whether this tier takes the problem (dtype, p, n); alignment of the tensors is the host's. */ \
  /* Defined in plan.cpp, so that plans need no kernels. */                                      \
  bool supports(const Problem& problem, const Device& device);                                   \
  std::size_t forward_workspace_bytes(const Problem&, const Plan&, const Device&);               \
  std::size_t backward_workspace_bytes(const Problem&, const Plan&, const Device&);              \
  /* Elements of dtype that save_states keeps (0: nothing is kept). */                           \
  int64_t chunk_states_numel(const Problem&, const Plan&);                                       \
  int forward(const ForwardParams&, const Plan&, const Device&, void* workspace, void* stream);  \
  int backward(const BackwardParams&, const Plan&, const Device&, void* workspace, void* stream); \
  }

MAMBA2_SSD_TIER(any)
MAMBA2_SSD_TIER(sm80)
MAMBA2_SSD_TIER(sm90)
#undef MAMBA2_SSD_TIER

}  // namespace mamba2::ssd
