// Instances of fused_scan (sm_90a) for all that is not plain: packed sequences, resets, other types
// of dt and parameters, p whose last unit is padded, n below 64.
#include "fused_scan_launch_sm90.cuh"

namespace mamba2::ssd::sm90 {

int fused_scan_general(const FusedScanArgs& args, DType dtype, bool gate, int sm_count,
                       void* stream) {
  return run_dtype<false>(args, dtype, gate, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
