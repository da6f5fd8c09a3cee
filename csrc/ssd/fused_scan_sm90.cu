// Plain instances of fused_scan (sm_90a), and the choice between them and the general ones.
#include "fused_scan_launch_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace {

__global__ void clear_words_kernel(int* words, int count) {
  ptx::griddepcontrol_launch_dependents();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads)
    words[i] = 0;
}

}  // namespace

int clear_words(int* words, int count, void* stream) {
  const Range range("clear_words");
  LaunchShape at;
  at.grid = dim3(ceil_div(count, kThreads) < 32 ? ceil_div(count, kThreads) : 32);
  at.threads = kThreads;
  return launch(clear_words_kernel, at, stream, words, count);
}

int fused_scan(const FusedScanArgs& args, DType dtype, bool gate, int sm_count, void* stream) {
  const Range range("fused_scan");
  return is_plain(args, dtype) ? run_dtype<true>(args, dtype, gate, sm_count, stream)
                               : fused_scan_general(args, dtype, gate, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
