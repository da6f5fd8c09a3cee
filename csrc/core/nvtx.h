// Names for Nsight Systems: while a Range lives, what the host queues belongs to that stage.
// With no profiler attached both calls return at once.
#pragma once

#if defined(MAMBA2_EMULATE) || !MAMBA2_WITH_CUDA
namespace mamba2 {
struct Range {
  explicit Range(const char*) {}
};
}  // namespace mamba2
#else
#include <nvtx3/nvToolsExt.h>

namespace mamba2 {
class Range {
 public:
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};
}  // namespace mamba2
#endif
