// Blocks that wait for each other: a cumulative sum whose segments are taken by ticket and handed
// on through flags, as segments of a long sequence are. With seeded faults.
#include "self_test.h"

namespace mamba2::self_test {
namespace {

constexpr int kThreads = 64;

struct TicketSmem {
  float x[kThreads];
  int segment;
};

__global__ void tickets_kernel(Tickets p, Fault fault) {
  TicketSmem& s = *static_cast<TicketSmem*>(ptx::dynamic_smem());
  const int thread = threadIdx.x;
  if (thread == 0) {
    s.segment = fault == Fault::no_ticket ? p.segments - 1 - static_cast<int>(blockIdx.x)
                                          : ptx::atom_add_relaxed_gpu(&p.words[0], 1);
  }
  __syncthreads();
  const int segment = s.segment;
  int* flags = p.words + 1;
  const float mine = thread < p.length ? p.x[segment * p.length + thread] : 0.f;
  s.x[thread] = mine;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i <= thread; ++i) sum += s.x[i];
  if (segment > 0 && fault != Fault::no_flag_wait) {
    while (ptx::ld_acquire_gpu(&flags[segment - 1]) == 0) ptx::nanosleep(20);
  }
  if (segment > 0) sum += p.carry[segment - 1];
  if (thread == p.length - 1) p.carry[segment] = sum;
  if (thread < p.length) p.y[segment * p.length + thread] = sum;
  if (fault != Fault::no_barrier_before_flag) __syncthreads();
  if (thread == 0) ptx::st_release_gpu(&flags[segment], 1);
}

}  // namespace

int tickets(const Tickets& p, Fault fault) {
  LaunchShape at;
  at.grid = dim3(p.segments);
  at.threads = kThreads;
  at.smem_bytes = sizeof(TicketSmem);
  return launch(tickets_kernel, at, nullptr, p, fault);
}

}  // namespace mamba2::self_test
