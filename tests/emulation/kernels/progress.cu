// A block that works beside the one that makes what it works on: tiles are stored by the bulk
// engine and counted, and loaded by it as the count goes on. With seeded faults.
#include "../../../csrc/tile/progress.cuh"
#include "self_test.h"

namespace mamba2::self_test {
namespace {

constexpr int kThreads = 32, kTileBytes = kThreads * sizeof(float);

struct alignas(128) ProgressSmem {
  float tile[kThreads];
  ptx::Mbarrier full;
};

// tile i = 2 x_i
MAMBA2_DEVICE void make(const Progress& p, ProgressSmem& s, Fault fault) {
  const int thread = threadIdx.x;
  for (int i = 0; i < p.tiles; ++i) {
    s.tile[thread] = 2 * p.x[i * kThreads + thread];
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (thread == 0) {
      ptx::bulk_store(p.tile + i * kThreads, s.tile, kTileBytes);
      ptx::bulk_commit_group();
      ptx::bulk_wait_group_read<0>();
      const int done = fault == Fault::count_too_low ? i : i + 1;
      if (fault != Fault::count_before_store) ptx::bulk_wait_group<0>();
      tile::publish(p.count, done);
    }
    __syncwarp();
  }
}

// y_i = tile i
MAMBA2_DEVICE void use(const Progress& p, ProgressSmem& s, Fault fault) {
  const int thread = threadIdx.x;
  for (int i = 0; i < p.tiles; ++i) {
    if (thread == 0) {
      if (fault == Fault::no_fence_behind_count)
        while (ptx::ld_acquire_gpu(p.count) < i + 1) ptx::nanosleep(20);
      else if (fault != Fault::no_wait_for_count)
        tile::wait_published(p.count, i + 1);
      ptx::mbarrier_arrive_expect_tx(&s.full, kTileBytes);
      ptx::bulk_load(s.tile, p.tile + i * kThreads, kTileBytes, &s.full);
    }
    ptx::mbarrier_wait(&s.full, i & 1);
    p.y[i * kThreads + thread] = s.tile[thread];
    __syncwarp();
  }
}

__global__ void progress_kernel(Progress p, Fault fault) {
  ProgressSmem& s = *static_cast<ProgressSmem*>(ptx::dynamic_smem());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  if (blockIdx.x == 0) {
    if (fault == Fault::no_grid_wait)
      ptx::ld_acquire_gpu(p.count);
    else
      ptx::griddepcontrol_wait();
    make(p, s, fault);
  } else {
    use(p, s, fault);
  }
}

}  // namespace

int progress(const Progress& p, Fault fault) {
  LaunchShape at;
  at.grid = dim3(2);
  at.threads = kThreads;
  at.smem_bytes = sizeof(ProgressSmem);
  at.programmatic = true;
  return launch(progress_kernel, at, nullptr, p, fault);
}

}  // namespace mamba2::self_test
