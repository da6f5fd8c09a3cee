// Small kernels that use the whole ptx layer, and the faults that can be seeded into them.
#pragma once
#include "../../../csrc/core/convert.cuh"
#include "../../../csrc/core/launch.h"
#include "../../../csrc/core/tensor_map.h"
#include "../../../csrc/ptx/sm90.cuh"

namespace mamba2::self_test {

// test_layer.py knows them by these names.
enum class Fault : int {
  none,
  // wgmma_gemm
  arrival_count,
  no_init_fence,
  producer_phase,
  consumer_phase,
  too_many_bytes,
  too_few_bytes,
  stride,
  misaligned_descriptor,
  descriptor_out_of_range,
  no_wgmma_fence,
  no_wgmma_wait,
  release_before_wait,
  accumulator_in_flight,
  no_swizzle,
  no_barrier,
  no_store_wait,
  no_proxy_fence,
  registers,
  // mma_gemm
  no_copy_wait,
  no_barrier_after_wait,
  no_barrier_before_reuse,
  misaligned_copy,
  // tickets
  no_flag_wait,
  no_ticket,
  no_barrier_before_flag,
  // operands
  leading_and_stride_exchanged,
  no_transpose_bit,
  past_shared_memory,
  missing_lane,
  // progress
  count_too_low,
  count_before_store,
  no_wait_for_count,
  no_fence_behind_count,
  no_grid_wait,
};

// C (m, n) = A (m, k) B^T, B (n, k).
struct Gemm {
  int m, n, k;
  const bf16 *a, *b;
  bf16* c;
};
int wgmma_gemm(const Gemm&, Fault);
int mma_gemm(const Gemm&, Fault);

// y = cumulative sum of x (segments, length), one block a segment.
struct Tickets {
  int segments, length;
  const float* x;
  float* y;
  float* carry;  // (segments)
  int* words;    // (1 + segments) zeros: the ticket counter and the flags
};
int tickets(const Tickets&, Fault);

// y = 2 x (tiles, 32), through tiles that one block makes and another uses.
struct Progress {
  int tiles;
  const float* x;
  float *tile, *y;
  int* count;  // 0: of tiles made
};
int progress(const Progress&, Fault);

// chunk_cumsum of one row, and counts that it makes zero.
struct Prepared {
  int length, h, zero_count;
  const float *dt, *A;  // (length, h), (h)
  float *delta, *a_cumsum_log2;
  int* zeros;
};
int preparation(const Prepared&);

// D (64, n) = A B with K = 64, A and B as `variant` of operands.cu wants them.
struct Operands {
  int variant;
  const void *a, *b;
  float* d;
};
int operands(const Operands&, Fault);

}  // namespace mamba2::self_test
