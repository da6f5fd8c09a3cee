// Instances of fused_scan (sm_90a) and their launch.
#include "../core/launch.h"
#include "fused_scan_loader_sm90.cuh"
#include "fused_scan_output_sm90.cuh"
#include "fused_scan_sm90.h"
#include "fused_scan_state_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace {

template <class T, int kN, bool kGate, bool kStateOnly>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    fused_scan_kernel(const MAMBA2_GRID_CONSTANT FusedScanArgs args) {
#if MAMBA2_SM90A
  constexpr int kStages = fused_scan_stages<T, kN, kGate>();
  auto& s = *static_cast<FusedScanSmem<T, kN, kGate, kStages>*>(ptx::dynamic_smem());
  const int role = threadIdx.x / tile::kWarpgroup, thread = threadIdx.x % tile::kWarpgroup;
  constexpr int kReaders = kStateOnly ? 1 : 1 + kUnits;  // warpgroups that read a stage
  if (threadIdx.x == 0) {
    s.ring.init(1, kReaders * tile::kWarpgroup);
    for (auto& ring : s.state_ring) ring.init(tile::kWarpgroup, tile::kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (role == kLoader) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    if (thread == 0) Loader<T, kN, kGate, kStages, kStateOnly>{args, s, {}}.run();
  } else if (role == kState) {
    ptx::setmaxnreg_inc<kStateRegisters + (kStateOnly ? 16 : 0)>();  // (no outputs there)
    StateKeeper<T, kN, kGate, kStages, kStateOnly>(args, s, thread).run();
  } else if constexpr (!kStateOnly) {
    ptx::setmaxnreg_inc<kOutputRegisters>();
    Output<T, kN, kGate, kStages>(args, s, role - kFirstOutput, thread).run();
  }
#endif
}

template <class T, int kN, bool kGate, bool kStateOnly>
int run(const FusedScanArgs& args, int sm_count, void* stream) {
  LaunchShape at;
  at.grid = dim3(args.tasks < sm_count ? args.tasks : sm_count);
  at.threads = kThreads;
  at.smem_bytes = sizeof(FusedScanSmem<T, kN, kGate, fused_scan_stages<T, kN, kGate>()>);
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
