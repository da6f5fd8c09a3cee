// The kernel fused_scan (sm_90a) and the launch of its instances.
#pragma once
#include "../core/launch.h"
#include "fused_scan_feed_sm90.cuh"
#include "fused_scan_scanner_sm90.cuh"
#include "fused_scan_scorer_sm90.cuh"
#include "fused_scan_sm90.h"

namespace mamba2::ssd::sm90 {

template <class I>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    fused_scan_kernel(const MAMBA2_GRID_CONSTANT FusedScanArgs args) {
#if MAMBA2_SM90A
  constexpr int kN = I::kN, kUnits = I::kUnits;
  auto& s = *static_cast<SmemOf<I>*>(ptx::dynamic_smem());
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
  } else if (threadIdx.x == 32) {  // meanwhile
    ptx::prefetch_tensormap(&args.C);
    ptx::prefetch_tensormap(&args.B);
    ptx::prefetch_tensormap(&args.x);
  }
  __syncthreads();
  // In this order the code of the roles lies in memory, which decides what the instruction cache
  // misses: 0.4 to 2.3% of a short row's time beside eight others (docs/kernels.md).
  if (role == kFeeders) {
    ptx::setmaxnreg_dec<feeder_registers(kN)>();
    const int warp = tile::uniform(thread / 32), lane = thread % 32;
    if (warp == kLoader) {
      Loader<I>{args, s}.run();
    } else if (warp < kStorer) {
      Decays<I>(args, s, warp - kFirstDecays, lane).run();
    } else {
      Storer<I>{args, s, lane}.run();
    }
  } else if (role >= kFirstScanner) {
    ptx::setmaxnreg_inc<scanner_registers(kN)>();
    Scanner<I>(args, s, role - kFirstScanner, thread).run();
  } else {
    ptx::setmaxnreg_dec<scorer_registers(kN)>();
    Scorer<I>(args, s, thread).run();
  }
#endif
}

template <class I>
int run(const FusedScanArgs& args, int sm_count, void* stream) {
  LaunchShape at;
  const int tasks = args.tasks - args.prefixes;  // whose prefixes are no blocks of their own
  at.grid = dim3(tasks < sm_count ? tasks : sm_count);
  at.threads = kThreads;
  at.programmatic = true;  // blocks set up while the kernel before ends
  at.smem_bytes = sizeof(SmemOf<I>);
  at.tile = {kQ, kP, I::kN, stages_of<I>()};
  return launch(fused_scan_kernel<I>, at, stream, args);
}

template <class T, int kN, bool kPlain>
int run_mode(const FusedScanArgs& args, bool gate, int sm_count, void* stream) {
  return gate ? run<Instance<T, kN, true, kPlain>>(args, sm_count, stream)
              : run<Instance<T, kN, false, kPlain>>(args, sm_count, stream);
}

template <class T, bool kPlain>
int run_n(const FusedScanArgs& args, bool gate, int sm_count, void* stream) {
  if (args.n <= 64) return run_mode<T, 64, kPlain>(args, gate, sm_count, stream);
  if (args.n == 128) return run_mode<T, 128, kPlain>(args, gate, sm_count, stream);
  return run_mode<T, 256, kPlain>(args, gate, sm_count, stream);
}

template <bool kPlain>
int run_dtype(const FusedScanArgs& args, DType dtype, bool gate, int sm_count, void* stream) {
  return dtype == DType::bf16 ? run_n<bf16, kPlain>(args, gate, sm_count, stream)
                              : run_n<f16, kPlain>(args, gate, sm_count, stream);
}

}  // namespace mamba2::ssd::sm90
