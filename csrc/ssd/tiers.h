// The entry points of the tiers: what ssd_scan_cuda.cpp calls. Each returns a cudaError_t as int.
// `workspace` is device memory of at least workspace_bytes, 1024-byte aligned, contents undefined.
#pragma once
#include <cstddef>

#include "params.h"
#include "plan.h"

namespace mamba2::ssd {

#define MAMBA2_SSD_TIER(tier)                                                                      \
  namespace tier {                                                                                 \
  /* Whether this tier takes the problem (dtype, p, n); alignment of the tensors is the host's. */ \
  /* Defined in plan.cpp, so that plans need no kernels. */                                        \
  bool supports(const Problem& problem, const Device& device);                                     \
  std::size_t forward_workspace_bytes(const Problem&, const Plan&, const Device&);                 \
  std::size_t backward_workspace_bytes(const Problem&, const Plan&, const Device&);                \
  /* Elements of dtype that save_states keeps (0: nothing is kept). */                             \
  int64_t chunk_states_numel(const Problem&, const Plan&);                                         \
  int forward(const ForwardParams&, const Plan&, const Device&, void* workspace, void* stream);    \
  int backward(const BackwardParams&, const Plan&, const Device&, void* workspace, void* stream);  \
  }

MAMBA2_SSD_TIER(any)
MAMBA2_SSD_TIER(sm80)
MAMBA2_SSD_TIER(sm90)
#undef MAMBA2_SSD_TIER

// The entry points of one tier.
struct TierKernels {
  decltype(&any::forward_workspace_bytes) forward_workspace_bytes;
  decltype(&any::backward_workspace_bytes) backward_workspace_bytes;
  decltype(&any::chunk_states_numel) chunk_states_numel;
  decltype(&any::forward) forward;
  decltype(&any::backward) backward;
};

inline const TierKernels& kernels_of(Tier tier) {
  static constexpr TierKernels kAny{any::forward_workspace_bytes, any::backward_workspace_bytes,
                                    any::chunk_states_numel, any::forward, any::backward};
  static constexpr TierKernels kSm80{sm80::forward_workspace_bytes, sm80::backward_workspace_bytes,
                                     sm80::chunk_states_numel, sm80::forward, sm80::backward};
  static constexpr TierKernels kSm90{sm90::forward_workspace_bytes, sm90::backward_workspace_bytes,
                                     sm90::chunk_states_numel, sm90::forward, sm90::backward};
  return tier == Tier::sm90 ? kSm90 : tier == Tier::sm80 ? kSm80 : kAny;
}

}  // namespace mamba2::ssd
