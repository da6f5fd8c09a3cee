// Instances of fused_scan (sm_90a) for the other p, whose last unit is padded, and n < 64.
#include "fused_scan_launch_sm90.cuh"

namespace mamba2::ssd::sm90 {

int fused_scan_padded(const FusedScanArgs& args, DType dtype, bool gate, int sm_count,
                      void* stream) {
  return run_dtype<true>(args, dtype, gate, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
