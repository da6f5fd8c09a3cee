// One wgmma product, D (64, N) = A (64, 64) B (64, N), with its operands laid out in every way that
// the ptx layer offers; D leaves through stmatrix, half rounded. With seeded faults.
#include "self_test.h"

namespace mamba2::self_test {
namespace {

constexpr int kM = 64, kK = 64, kPanelBytes = 64 * 128;

enum class AFrom { registers, k_major, m_major };  // m_major: stored (k, m)

struct alignas(1024) OperandSmem {
  char a[kPanelBytes];
  char b[4 * kPanelBytes];  // K-major: (n, k); MN-major: panels of 64 n, (k, n)
  ptx::Mbarrier full;
};

template <class T, int N, AFrom kA, bool kTransposeB>
__global__ void operands_kernel(const MAMBA2_GRID_CONSTANT ptx::TensorMap map_a,
                                const MAMBA2_GRID_CONSTANT ptx::TensorMap map_b, const T* a,
                                float* d, Fault fault) {
  OperandSmem& s = *static_cast<OperandSmem*>(ptx::dynamic_smem());
  constexpr int kPanels = kTransposeB ? (N + 63) / 64 : 1;
  constexpr int kBytesB = kTransposeB ? kPanels * kPanelBytes : N * 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, kPanelBytes + kBytesB);
    ptx::tma_load_4d(s.a, &map_a, 0, 0, 0, 0, &s.full);
    for (int i = 0; i < kPanels; ++i) {
      ptx::tma_load_4d(s.b + i * kPanelBytes, &map_b, i * 64, 0, 0, 0, &s.full);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  uint32_t leading = kTransposeB ? kPanelBytes : 0, stride = 1024;
  if (fault == Fault::leading_and_stride_exchanged) std::swap(leading, stride);
  const uint64_t desc_a = ptx::wgmma_descriptor(s.a, 0, 1024);
  const uint64_t desc_b = ptx::wgmma_descriptor(s.b, leading, stride);
  float acc[N / 2];
  ptx::wgmma_fence();
  for (int k = 0; k < kK / 16; ++k) {
    const uint64_t b = desc_b + (kTransposeB ? 2048 >> 4 : 32 >> 4) * k;
    if constexpr (kA == AFrom::registers) {
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) {
        const T* at = a + (row + 8 * (i & 1)) * kK + k * 16 + 2 * (lane % 4) + 8 * (i >> 1);
        r[i] = pack2<T>(convert<float>(at[0]), convert<float>(at[1]));
      }
      if (fault == Fault::no_transpose_bit) {
        ptx::WgmmaRs<T, N, !kTransposeB>::run(acc, r, b, k > 0);
      } else {
        ptx::WgmmaRs<T, N, kTransposeB>::run(acc, r, b, k > 0);
      }
    } else {
      constexpr bool kTransposeA = kA == AFrom::m_major;
      const uint64_t at = desc_a + (kTransposeA ? 2048 >> 4 : 32 >> 4) * k;
      ptx::WgmmaSs<T, N, kTransposeA, kTransposeB>::run(acc, at, b, k > 0);
    }
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  __syncthreads();  // s.b becomes D, (n, m) by the transposed store: 16-bit, rows of 64 m
  T* out = reinterpret_cast<T*>(s.b);
  for (int j = 0; j < N; j += 16) {
    const int matrix = lane / 8, n = j + matrix / 2 * 8 + lane % 8, m = warp * 16 + matrix % 2 * 8;
    const auto pair = [&](int i) { return pack2<T>(acc[j / 2 + i], acc[j / 2 + i + 1]); };
    if (fault == Fault::missing_lane && lane == 5) continue;
    ptx::stmatrix_x4_trans(out + n * kM + m, pair(0), pair(2), pair(4), pair(6));
  }
  if (fault == Fault::past_shared_memory) *(s.a + sizeof(OperandSmem)) = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < kM * N; i += 128) d[i] = convert<float>(out[i % N * kM + i / N]);
}

template <class T, int N, AFrom kA, bool kTransposeB>
int run(const Operands& o, Fault fault) {
  const auto map = [](ptx::TensorMap* to, const void* p, int rows, int columns, int box_rows) {
    const int64_t dims[4] = {columns, rows, 1, 1};
    const int64_t strides[3] = {columns * 2, int64_t{rows} * columns * 2, int64_t{1} << 20};
    const int box[4] = {64, box_rows, 1, 1};
    return make_tensor_map(to, DTypeOf<T>::value, p, 4, dims, strides, box, true);
  };
  ptx::TensorMap a, b;
  int e = map(&a, o.a, 64, 64, 64);
  if (!e) e = kTransposeB ? map(&b, o.b, kK, N, kK) : map(&b, o.b, N, kK, N);
  if (e) return e;
  LaunchShape at;
  at.grid = dim3(1);
  at.threads = 128;
  at.smem_bytes = sizeof(OperandSmem);
  return launch(operands_kernel<T, N, kA, kTransposeB>, at, nullptr, a, b,
                static_cast<const T*>(o.a), o.d, fault);
}

}  // namespace

int operands(const Operands& o, Fault fault) {
  switch (o.variant) {  // as VARIANTS of test_layer.py
    case 0:
      return run<bf16, 64, AFrom::k_major, false>(o, fault);
    case 1:
      return run<bf16, 128, AFrom::registers, false>(o, fault);
    case 2:
      return run<bf16, 128, AFrom::registers, true>(o, fault);
    case 3:
      return run<f16, 80, AFrom::k_major, true>(o, fault);
    case 4:
      return run<f16, 32, AFrom::m_major, true>(o, fault);
    default:
      return run<bf16, 128, AFrom::m_major, false>(o, fault);
  }
}

}  // namespace mamba2::self_test
