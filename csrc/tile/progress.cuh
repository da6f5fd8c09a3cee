// How far a block has come, for blocks of the kernel behind it that run beside it.
//
// The count is zero before either begins. What was stored before a count is published is there for
// whoever has waited for that count, the asynchronous engine's loads included.
#pragma once
#include "../ptx/sm90.cuh"

namespace mamba2::tile {

// `count` counts at once. By a thread that knows the stores to be complete: bulk stores when those
// who have issued them have waited for that (bulk_wait_group), and met this thread at a barrier.
MAMBA2_DEVICE void publish(int* progress, int done, int count = 1) {
  ptx::fence_acq_rel_gpu();
  for (int i = 0; i < count; ++i) ptx::st_relaxed_gpu(progress + i, done);
}
// Sleeps between looks: the blocks waited for share the card.
MAMBA2_DEVICE void wait_published(const int* progress, int done) {
  while (ptx::ld_acquire_gpu(progress) < done) ptx::nanosleep(200);
  ptx::fence_proxy_async_global();
}

}  // namespace mamba2::tile
