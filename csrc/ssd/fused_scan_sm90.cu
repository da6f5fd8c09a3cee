// Instances of fused_scan (sm_90a) and their launch.
#include "../core/launch.h"
#include "fused_scan_feed_sm90.cuh"
#include "fused_scan_scanner_sm90.cuh"
#include "fused_scan_sm90.h"

namespace mamba2::ssd::sm90 {
namespace {

template <class T, int kN, bool kGate, bool kStateOnly>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    fused_scan_kernel(const MAMBA2_GRID_CONSTANT FusedScanArgs args) {
#if MAMBA2_SM90A
  constexpr int kStages = fused_scan_stages<T, kN, kGate>();
  auto& s = *static_cast<FusedScanSmem<T, kN, kGate, kStages>*>(ptx::dynamic_smem());
  const int role = threadIdx.x / tile::kWarpgroup, thread = threadIdx.x % tile::kWarpgroup;
  if (threadIdx.x == 0) {
    s.ring.init(1, 32 + (1 + kUnits) * tile::kWarpgroup);
    s.weights_ring.init(32 + tile::kWarpgroup, kUnits * tile::kWarpgroup);
    s.decays_ring.init(32, 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = 0; i < kBuffers * kUnits; ++i)  // blocks above the diagonal are never written again
    tile::zero_rows<kQ>(s.weights[i / kUnits].scores[i % kUnits], 0, threadIdx.x, kThreads);
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (role == kLoader) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    if (thread == 0) Loader<T, kN, kGate, kStages, kStateOnly>{args, s, {}}.run();
    if (thread / 32 == 1) Decays<T, kN, kGate, kStages, kStateOnly>{s, thread % 32}.run();
  } else if (role == kScorer) {
    ptx::setmaxnreg_dec<kScorerRegisters>();
    Scorer<T, kN, kGate, kStages, kStateOnly>(args, s, thread).run();
  } else {
    ptx::setmaxnreg_inc<kScannerRegisters>();
    Scanner<T, kN, kGate, kStages, kStateOnly>(args, s, role - kFirstScanner, thread).run();
  }
#endif
}

template <class T, int kN, bool kGate, bool kStateOnly>
int run(const FusedScanArgs& args, int sm_count, void* stream) {
  LaunchShape at;
  at.grid = dim3(args.tasks < sm_count ? args.tasks : sm_count);
  at.threads = kThreads;
  at.programmatic = true;  // blocks set up while chunk_cumsum ends
  at.smem_bytes = sizeof(FusedScanSmem<T, kN, kGate, fused_scan_stages<T, kN, kGate>()>);
  at.tile = {kQ, kP, kN, fused_scan_stages<T, kN, kGate>()};
  return launch(fused_scan_kernel<T, kN, kGate, kStateOnly>, at, stream, args);
}

template <class T, int kN>
int run_mode(const FusedScanArgs& args, bool gate, bool state_only, int sm_count, void* stream) {
  if (state_only) return run<T, kN, false, true>(args, sm_count, stream);
  return gate ? run<T, kN, true, false>(args, sm_count, stream)
              : run<T, kN, false, false>(args, sm_count, stream);
}

template <class T>
int run_n(const FusedScanArgs& args, bool gate, bool state_only, int sm_count, void* stream) {
  return args.n == 64 ? run_mode<T, 64>(args, gate, state_only, sm_count, stream)
                      : run_mode<T, 128>(args, gate, state_only, sm_count, stream);
}

}  // namespace

int fused_scan(const FusedScanArgs& args, DType dtype, bool gate, bool state_only, int sm_count,
               void* stream) {
  const Range range("fused_scan");
  return dtype == DType::bf16 ? run_n<bf16>(args, gate, state_only, sm_count, stream)
                              : run_n<f16>(args, gate, state_only, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
