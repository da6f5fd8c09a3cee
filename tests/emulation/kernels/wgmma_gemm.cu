// C (M, N) = A (M, K) B^T, B (N, K): TMA ring, two consumer warpgroups, wgmma. With seeded faults.
#include "self_test.h"

namespace mamba2::self_test {

constexpr int kTile = 64, kStages = 3, kConsumers = 2;

struct alignas(1024) WgmmaSmem {
  bf16 a[kStages][kConsumers][kTile * kTile];
  bf16 b[kStages][kTile * kTile];
  bf16 out[kConsumers][kTile * kTile];
  ptx::Mbarrier full[kStages], empty[kStages];
};

struct WgmmaParams {
  int k_tiles;
  Fault fault;
};

__global__ void wgmma_gemm_kernel(const MAMBA2_GRID_CONSTANT ptx::TensorMap map_a,
                                  const MAMBA2_GRID_CONSTANT ptx::TensorMap map_b,
                                  const MAMBA2_GRID_CONSTANT ptx::TensorMap map_c,
                                  WgmmaParams params) {
  WgmmaSmem& s = *static_cast<WgmmaSmem*>(ptx::dynamic_smem());
  const Fault fault = params.fault;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int m0 = blockIdx.y * kTile * kConsumers, n0 = blockIdx.x * kTile;
  if (threadIdx.x == 0) {
    const int arrivals = kConsumers * 128 - (fault == Fault::arrival_count ? 1 : 0);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], arrivals);
    }
    if (fault != Fault::no_init_fence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group == kConsumers) {
    if (fault != Fault::registers) ptx::setmaxnreg_dec<40>();
    if (thread != 0) return;
    for (int k = 0; k < params.k_tiles; ++k) {
      const int stage = k % kStages, phase = k / kStages & 1;
      ptx::mbarrier_wait(&s.empty[stage], fault == Fault::producer_phase ? phase : phase ^ 1);
      uint32_t bytes = (kConsumers + 1) * kTile * kTile * 2;
      if (fault == Fault::too_many_bytes) bytes += 16;
      if (fault == Fault::too_few_bytes) bytes -= kTile * kTile * 2;
      ptx::mbarrier_arrive_expect_tx(&s.full[stage], bytes);
      for (int c = 0; c < kConsumers; ++c) {
        ptx::tma_load_3d(s.a[stage][c], &map_a, k * kTile, m0 + c * kTile, 0, &s.full[stage]);
      }
      ptx::tma_load_3d(s.b[stage], &map_b, k * kTile, n0, 0, &s.full[stage]);
    }
    return;
  }
  ptx::setmaxnreg_inc<232>();
  float acc[kTile / 2];
  for (float& v : acc) v = 0.f;
  const uint32_t sbo = fault == Fault::stride ? 512 : 1024;
  for (int k = 0; k < params.k_tiles; ++k) {
    const int stage = k % kStages, phase = k / kStages & 1;
    ptx::mbarrier_wait(&s.full[stage], fault == Fault::consumer_phase ? phase ^ 1 : phase);
    uint64_t a = ptx::wgmma_descriptor(s.a[stage][group], 0, sbo);
    uint64_t b = ptx::wgmma_descriptor(s.b[stage], 0, sbo);
    if (fault == Fault::misaligned_descriptor) a += 8;
    if (fault == Fault::descriptor_out_of_range) b += (200 * 1024) >> 4;
    if (fault != Fault::no_wgmma_fence) ptx::wgmma_fence();
    for (int i = 0; i < kTile / 16; ++i) {
      ptx::WgmmaSs<bf16, kTile, false, false>::run(acc, a + 2 * i, b + 2 * i, true);
    }
    ptx::wgmma_commit_group();
    if (fault == Fault::release_before_wait) ptx::mbarrier_arrive(&s.empty[stage]);
    if (fault == Fault::accumulator_in_flight) acc[3] += 1.f;
    if (fault != Fault::no_wgmma_wait) ptx::wgmma_wait_group<0>();
    if (fault != Fault::release_before_wait) ptx::mbarrier_arrive(&s.empty[stage]);
  }
  const int warp = thread / 32, lane = thread % 32;
  char* out = reinterpret_cast<char*>(s.out[group]);
  for (int j = 0; j < kTile / 2; j += 2) {
    const int row = warp * 16 + lane / 4 + 8 * (j >> 1 & 1), column = 8 * (j / 4) + 2 * (lane % 4);
    const int unit = fault == Fault::no_swizzle ? column / 8 : (column / 8) ^ (row % 8);
    const uint32_t pair = pack2<bf16>(acc[j], acc[j + 1]);
    *reinterpret_cast<uint32_t*>(out + row * 128 + unit * 16 + column % 8 * 2) = pair;
  }
  if (fault != Fault::no_proxy_fence) ptx::fence_proxy_async_shared();
  if (fault != Fault::no_barrier) ptx::bar_sync(1 + group, 128);
  if (thread == 0) {
    ptx::tma_store_3d(&map_c, n0, m0 + group * kTile, 0, s.out[group]);
    ptx::bulk_commit_group();
    if (fault != Fault::no_store_wait) ptx::bulk_wait_group_read<0>();
  }
}

int wgmma_gemm(const Gemm& g, Fault fault) {
  const auto map = [&](ptx::TensorMap* to, const bf16* p, int rows, int columns) {
    const int64_t dims[3] = {columns, rows, 1},
                  strides[2] = {columns * 2, int64_t{rows} * columns * 2};
    const int box[3] = {kTile, kTile, 1};
    return make_tensor_map(to, DType::bf16, p, 3, dims, strides, box, true);
  };
  ptx::TensorMap a, b, c;
  int e = map(&a, g.a, g.m, g.k);
  if (!e) e = map(&b, g.b, g.n, g.k);
  if (!e) e = map(&c, g.c, g.m, g.n);
  if (e) return e;
  LaunchShape at;
  at.grid = dim3(ceil_div(g.n, kTile), ceil_div(g.m, kTile * kConsumers));
  at.threads = 128 * (kConsumers + 1);
  at.smem_bytes = sizeof(WgmmaSmem);
  return launch(wgmma_gemm_kernel, at, nullptr, a, b, c, WgmmaParams{ceil_div(g.k, kTile), fault});
}

}  // namespace mamba2::self_test
