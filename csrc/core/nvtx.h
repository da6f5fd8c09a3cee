// Names for Nsight Systems: while a Range lives, what the host queues belongs to that stage.
// With no profiler attached both calls return at once.
#pragma once
#include "launch_log.h"

#if defined(MAMBA2_EMULATE) || !MAMBA2_WITH_CUDA
namespace mamba2 {
struct Range {
  explicit Range(const char* name) : stage(name) {}
  LaunchStage stage;
};
}  // namespace mamba2
#else
#include <nvtx3/nvToolsExt.h>

namespace mamba2 {
class Range {
 public:
  explicit Range(const char* name) : stage_(name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  LaunchStage stage_;
};
}  // namespace mamba2
#endif
