// C (m, n) = A (m, k) B^T, B (n, k): cp.async in two buffers, ldmatrix, mma.sync. With seeded
// faults.
#include "self_test.h"

namespace mamba2::self_test {
namespace {

constexpr int kTile = 64, kStep = 32, kPitch = kStep + 8, kWarps = 4;

struct MmaSmem {
  bf16 a[2][kTile * kPitch];
  bf16 b[2][kTile * kPitch];
};

MAMBA2_DEVICE void load_tile(bf16* to, const bf16* from, int row0, int rows, int k0, int k,
                             bool misaligned) {
  for (int i = threadIdx.x; i < kTile * kStep / 8; i += kWarps * 32) {
    const int row = i / (kStep / 8), column = i % (kStep / 8) * 8;
    const bool valid = row0 + row < rows && k0 + column < k;
    const bf16* source = valid ? from + int64_t{row0 + row} * k + k0 + column : from;
    ptx::cp_async_16(to + row * kPitch + column + (misaligned ? 1 : 0), source, valid);
  }
}

__global__ void mma_gemm_kernel(Gemm g, Fault fault) {
  MmaSmem& s = *static_cast<MmaSmem*>(ptx::dynamic_smem());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int steps = ceil_div(g.k, kStep);
  const auto load = [&](int i) {
    const bool misaligned = fault == Fault::misaligned_copy;
    load_tile(s.a[i % 2], g.a, m0, g.m, i * kStep, g.k, misaligned);
    load_tile(s.b[i % 2], g.b, n0, g.n, i * kStep, g.k, misaligned);
    ptx::cp_async_commit_group();
  };
  float acc[kTile / 8][4] = {};
  load(0);
  for (int i = 0; i < steps; ++i) {
    if (i + 1 < steps) {
      load(i + 1);
      if (fault != Fault::no_copy_wait) ptx::cp_async_wait_group<1>();
    } else {
      if (fault != Fault::no_copy_wait) ptx::cp_async_wait_group<0>();
    }
    if (fault != Fault::no_barrier_after_wait) __syncthreads();
    const bf16 *a = s.a[i % 2], *b = s.b[i % 2];
    for (int k = 0; k < kStep; k += 16) {
      uint32_t r_a[4];
      ptx::ldmatrix_x4(r_a, a + (warp * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
      for (int n = 0; n < kTile; n += 16) {
        uint32_t r_b[4];
        ptx::ldmatrix_x4(r_b, b + (n + lane % 8 + lane / 16 * 8) * kPitch + k + lane / 8 % 2 * 8);
        ptx::mma_m16n8k16<bf16>(acc[n / 8], r_a, r_b[0], r_b[1]);
        ptx::mma_m16n8k16<bf16>(acc[n / 8 + 1], r_a, r_b[2], r_b[3]);
      }
    }
    if (fault != Fault::no_barrier_before_reuse) __syncthreads();
  }
  for (int i = 0; i < kTile / 8; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = m0 + warp * 16 + lane / 4 + 8 * (j >> 1), column = n0 + i * 8 + lane % 4 * 2;
      if (row >= g.m || column + (j & 1) >= g.n) continue;
      g.c[int64_t{row} * g.n + column + (j & 1)] = convert<bf16>(acc[i][j]);
    }
  }
}

}  // namespace

int mma_gemm(const Gemm& g, Fault fault) {
  LaunchShape at;
  at.grid = dim3(ceil_div(g.n, kTile), ceil_div(g.m, kTile));
  at.threads = kWarps * 32;
  at.smem_bytes = sizeof(MmaSmem);
  return launch(mma_gemm_kernel, at, nullptr, g, fault);
}

}  // namespace mamba2::self_test
