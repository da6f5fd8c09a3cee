// The kernel fused_scan (sm_90a) and the launch of its instances.
#pragma once
#include "../core/launch.h"
#include "fused_scan_feed_sm90.cuh"
#include "fused_scan_scanner_sm90.cuh"
#include "fused_scan_scorer_sm90.cuh"
#include "fused_scan_sm90.h"

namespace mamba2::ssd::sm90 {

template <class T, int kN, bool kGate, bool kPadded>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    fused_scan_kernel(const MAMBA2_GRID_CONSTANT FusedScanArgs args) {
#if MAMBA2_SM90A
  constexpr int kStages = fused_scan_stages<T, kN, kGate>(), kUnits = units_per_block(kN);
  auto& s = *static_cast<FusedScanSmem<T, kN, kGate, kStages>*>(ptx::dynamic_smem());
  ptx::griddepcontrol_launch_dependents();
  const int role = tile::uniform(threadIdx.x / tile::kWarpgroup);
  const int thread = threadIdx.x % tile::kWarpgroup;
  if (threadIdx.x == 0) {
    s.tickets_ring.init(1, kBuffers * 32);
    s.ring.init(1, kScanners * tile::kWarpgroup + 32);
    s.decays_ring.init(32, 1);
    s.weights_ring.init(32 + tile::kWarpgroup, kScanners * tile::kWarpgroup);
    for (auto& y_ring : s.y_ring) y_ring.init(kScanners / kUnits * tile::kWarpgroup, 32);
    if constexpr (kUnits < kScanners)
      for (auto& ring : s.exchange.ring) ring.init(tile::kWarpgroup, tile::kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (role == kFeeders) {
    ptx::setmaxnreg_dec<feeder_registers(kN)>();
    const int warp = tile::uniform(thread / 32), lane = thread % 32;
    if (warp == kStorer) {
      Storer<T, kN, kGate, kStages, kPadded>{args, s, lane}.run();
    } else if (warp >= kFirstDecays) {
      Decays<T, kN, kGate, kStages>(args, s, warp - kFirstDecays, lane).run();
    } else {
      Loader<T, kN, kGate, kStages>{args, s}.run();
    }
  } else if (role == kScorer) {
    ptx::setmaxnreg_dec<scorer_registers(kN)>();
    Scorer<T, kN, kGate, kStages>(args, s, thread).run();
  } else {
    ptx::setmaxnreg_inc<scanner_registers(kN)>();
    Scanner<T, kN, kGate, kStages, kPadded>(args, s, role - kFirstScanner, thread).run();
  }
#endif
}

template <class T, int kN, bool kGate, bool kPadded>
int run(const FusedScanArgs& args, int sm_count, void* stream) {
  LaunchShape at;
  const int tasks = args.tasks - args.prefixes;  // whose prefixes are no blocks of their own
  at.grid = dim3(tasks < sm_count ? tasks : sm_count);
  at.threads = kThreads;
  at.programmatic = true;  // blocks set up while the kernel before ends
  at.smem_bytes = sizeof(FusedScanSmem<T, kN, kGate, fused_scan_stages<T, kN, kGate>()>);
  at.tile = {kQ, kP, kN, fused_scan_stages<T, kN, kGate>()};
  return launch(fused_scan_kernel<T, kN, kGate, kPadded>, at, stream, args);
}

template <class T, int kN, bool kPadded>
int run_mode(const FusedScanArgs& args, bool gate, int sm_count, void* stream) {
  return gate ? run<T, kN, true, kPadded>(args, sm_count, stream)
              : run<T, kN, false, kPadded>(args, sm_count, stream);
}

template <class T, bool kPadded>
int run_n(const FusedScanArgs& args, bool gate, int sm_count, void* stream) {
  if (args.n <= 64) return run_mode<T, 64, kPadded>(args, gate, sm_count, stream);
  if (args.n == 128) return run_mode<T, 128, kPadded>(args, gate, sm_count, stream);
  return run_mode<T, 256, kPadded>(args, gate, sm_count, stream);
}

template <bool kPadded>
int run_dtype(const FusedScanArgs& args, DType dtype, bool gate, int sm_count, void* stream) {
  return dtype == DType::bf16 ? run_n<bf16, kPadded>(args, gate, sm_count, stream)
                              : run_n<f16, kPadded>(args, gate, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
