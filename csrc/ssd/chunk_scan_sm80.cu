// chunk_scan: the outputs of a chunk from the state S entering it,
//   y_i = 2^s_i S C_i + sum_{j <= i} M_ij x_j + D x_i,   M = C B^T o 2^(s_i - s_j) o delta_j
// times silu(z_i) when there is a gate; or, gate backward, not y but dz and the gradient of what is
// before the gate, from dy.
//
// grid: (chunk, group, run of items), items fastest, so that chunks share C and B through L2. An
// item is a head and a tile of p; a block takes several of one group and computes C B^T, which is
// theirs in common, once: it stays in fp32 accumulators. A warp has 16 rows of the chunk and the
// columns up to its diagonal; blocks above it are skipped, and warps are paired so that the four
// schedulers of an SM have equal work.
//   per item: y = C S^T over slices of 64 of n (and C B^T with the first item); y_i *= 2^s_i;
//             for each block of 16 tokens j: M in registers, y += M x; then D, z, store.
// Shared memory at p 64: 2 slices of C, B (16 KB each) and S (8 KB), x (16 KB), 98 KB in all: two
// blocks an SM, and one on cards with 99 KB. The next item's slices are copied during this one.
// Bound by HBM (x, S and y once: 1.0 GB at b 8, l 4096, h 80, p 64, n 128) and the tensor pipe:
// 44 K FLOP a token and head with C B^T per head, 30 K when four heads share it.
#include "../core/launch.h"
#include "../tile/sm80.cuh"
#include "chunk_scan_work_sm80.cuh"
#include "gate_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int q = kChunkTokens, kSlice = 64, kStages = 2;
constexpr int kWarps = q / 16, kThreads = 32 * kWarps;

template <class Element, int tile_p, bool gate_backward>
struct ScanTile {
  using T = Element;
  static constexpr bool kGateBackward = gate_backward;
  static constexpr int kTileP = tile_p;
  static constexpr int kBlocksPerSM = tile_p > 64 || gate_backward ? 1 : 2;  // as registers allow
  struct Shared {
    tile::SharedTile<T, q, kSlice> C[kStages], B[kStages];
    tile::SharedTile<T, kTileP, kSlice> S[kStages];
    tile::SharedTile<T, q, kTileP> x;
    float a[q], delta[q];
    Work work;
    float D[kTileP];  // of the item's channels
    float weight[q];  // 2^(s_e - s_j) delta_j, e the last token of j's block of 16
  };
};

template <class Tile>
struct Scan {
  using T = typename Tile::T;
  static constexpr int kTileP = Tile::kTileP;
  const ChunkScanParams& params;
  typename Tile::Shared& shared;
  const Work& work;
  int row_block;  // this warp has the 16 rows of this block of the chunk
  float CB[q / 16][2][4];
  float y[kTileP / 16][2][4];

  MAMBA2_DEVICE int head(int item) const { return work.item[item].i_h; }
  MAMBA2_DEVICE int channel(int item) const { return work.item[item].p_base; }
  MAMBA2_DEVICE int slices() const { return ceil_div(params.n, kSlice); }
  MAMBA2_DEVICE const T* rows_of(const Strided& tensor, int i_h, int col) const {
    return static_cast<const T*>(tensor.ptr) + work.row * tensor.b + work.token * tensor.l +
           i_h * tensor.h + col;
  }

  // ---- copies ----
  // The slice `ahead` slices after slice i of an item, over the items' ends.
  struct Slice {
    int item, n_base;
  };
  MAMBA2_DEVICE Slice slice_after(int item, int i, int ahead) const {
    for (i += ahead; i >= slices(); i -= slices()) ++item;
    return {item, i * kSlice};
  }
  // Whether the stage holds these columns of C since an earlier item.
  MAMBA2_DEVICE bool has_C(Slice slice) const {
    return slices() <= kStages && slice.item * slices() >= kStages;
  }
  MAMBA2_DEVICE void load_C_and_B(Slice slice, int stage) {
    if (slice.item >= work.items) return;
    if (!has_C(slice)) {
      tile::copy_async<kThreads>(shared.C[stage], rows_of(params.C, work.i_g, slice.n_base),
                                 params.C.l, work.count, params.n - slice.n_base);
    }
    if (slice.item > 0) return;
    tile::copy_async<kThreads>(shared.B[stage], rows_of(params.B, work.i_g, slice.n_base),
                               params.B.l, work.count, params.n - slice.n_base);
  }
  // From tier sm90's images: ceil(p / 64) of 64 channels a head, image_n / 64 panels [channel][64
  // n] each, those of further columns behind all of these. They are swizzled as the tile of S is:
  // units of 16 bytes keep their place in a row.
  MAMBA2_DEVICE void load_S_images(Slice slice, int stage) {
    constexpr int kRows = 64, kUnits = kSlice / tile::kUnit;
    const int image_n = params.image_n;
    static_assert(tile::SharedTile<T, kTileP, kSlice>::kSwizzled && kTileP % 8 == 0, "one swizzle");
    const int64_t matrix = static_cast<int64_t>(work.i_chunk) * params.h + head(slice.item);
    const int64_t image =
        matrix * ceil_div(params.p, kRows) + slice.n_base / image_n * params.images;
    const T* g_S =
        static_cast<const T*>(params.states) + (image * image_n + slice.n_base % image_n) * kRows;
    MAMBA2_NO_UNROLL for (int i = threadIdx.x; i < kTileP * kUnits; i += kThreads) {
      const int p = channel(slice.item) + i / kUnits;
      const int64_t row = int64_t(p / kRows) * kRows * image_n + p % kRows * kSlice;
      ptx::cp_async_16(shared.S[stage].data + i * tile::kUnit, g_S + row + i % kUnits * tile::kUnit,
                       p < params.p);
    }
  }
  MAMBA2_DEVICE void load_S(Slice slice, int stage) {
    if (slice.item >= work.items) return;
    if constexpr (Tile::kGateBackward)
      if (params.image_n > 0) return load_S_images(slice, stage);
    const int p_base = channel(slice.item);
    const int64_t matrix = static_cast<int64_t>(work.i_chunk) * params.h + head(slice.item);
    const T* g_S = static_cast<const T*>(params.states) + (matrix * params.p + p_base) * params.n +
                   slice.n_base;
    tile::copy_async<kThreads>(shared.S[stage], g_S, params.n, params.p - p_base,
                               params.n - slice.n_base);
  }
  MAMBA2_DEVICE void load_x(int item) {
    if (item >= work.items) return;
    tile::copy_async<kThreads>(shared.x, rows_of(params.x, head(item), channel(item)), params.x.l,
                               work.count, params.p - channel(item));
  }
  MAMBA2_DEVICE void load_steps(int item) {
    if (item >= work.items) return;
    const int64_t at = (static_cast<int64_t>(work.i_chunk) * params.h + head(item)) * q;
    const int t = threadIdx.x % (q / 4) * 4;
    if (threadIdx.x < q / 4) {
      ptx::cp_async_16(shared.a + t, params.a_cumsum_log2 + at + t, true);
    } else if (threadIdx.x < q / 2) {
      ptx::cp_async_16(shared.delta + t, params.delta + at + t, true);
    }
  }

  // ---- y = C S^T and C B^T, over one slice of n ----
  MAMBA2_DEVICE void multiply_slice(int stage, bool with_B) {
    MAMBA2_NO_UNROLL for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[4], b[4];
      tile::load_a(a, shared.C[stage], 16 * row_block, k);
      MAMBA2_UNROLL for (int i = 0; i < kTileP / 16; ++i) {
        tile::load_b(b, shared.S[stage], 16 * i, k);
        tile::mma_16x16<T>(y[i][0], y[i][1], a, b);
      }
      if (!with_B) continue;
      MAMBA2_UNROLL for (int j = 0; j < q / 16; ++j) {
        if (j > row_block) break;
        tile::load_b(b, shared.B[stage], 16 * j, k);
        tile::mma_16x16<T>(CB[j][0], CB[j][1], a, b);
      }
    }
  }

  // ---- y = 2^s_i y + M x ----
  MAMBA2_DEVICE void form_weights(int item) {
    const int j = threadIdx.x;
    if (j < q) shared.weight[j] = ptx::ex2(shared.a[j | 15] - shared.a[j]) * shared.delta[j];
    if (j < kTileP && params.D.ptr != nullptr && channel(item) + j < params.p) {
      const int64_t i_h = head(item),
                    at = params.D_per_channel ? i_h * params.p + channel(item) + j : i_h;
      shared.D[j] = load<float>(params.D, at);
    }
  }
  // M of a block before the diagonal: 2^(s_i - s_j) = 2^(s_i - s_e) 2^(s_e - s_j), both <= 1.
  MAMBA2_DEVICE void mask_before(float (&m)[2][4], const float (&s_i)[2], int j) {
    const float s_e = shared.a[16 * j + 15];
    const float row[2] = {ptx::ex2(s_i[0] - s_e), ptx::ex2(s_i[1] - s_e)};
    MAMBA2_UNROLL for (int side = 0; side < 2; ++side) {
      const float2 weight = *reinterpret_cast<const float2*>(shared.weight + 16 * j + 8 * side +
                                                             tile::fragment_col());
      MAMBA2_UNROLL for (int e = 0; e < 4; ++e) {
        m[side][e] = CB[j][side][e] * row[e / 2] * (e % 2 ? weight.y : weight.x);
      }
    }
  }
  // The block on the diagonal: selected before multiplied, since 2^(s_i - s_j) overflows for j > i.
  MAMBA2_DEVICE void mask_diagonal(float (&m)[2][4], const float (&s_i)[2], int j) {
    MAMBA2_UNROLL for (int e = 0; e < 8; ++e) {
      const int row = tile::fragment_row() + e % 4 / 2 * 8;
      const int col = tile::fragment_col() + e / 4 * 8 + e % 2;
      const float weight =
          ptx::ex2(s_i[e % 4 / 2] - shared.a[16 * j + col]) * shared.delta[16 * j + col];
      m[e / 4][e % 4] = col <= row ? CB[j][e / 4][e % 4] * weight : 0.f;
    }
  }
  MAMBA2_DEVICE void multiply_chunk() {
    const int row = 16 * row_block + tile::fragment_row();
    const float s_i[2] = {shared.a[row], shared.a[row + 8]};
    const float decay[2] = {ptx::ex2(s_i[0]), ptx::ex2(s_i[1])};
    MAMBA2_UNROLL for (auto& block : y) {
      MAMBA2_UNROLL for (int e = 0; e < 8; ++e) block[e / 4][e % 4] *= decay[e % 4 / 2];
    }
    MAMBA2_UNROLL for (int j = 0; j < q / 16; ++j) {
      if (j > row_block) break;
      float m[2][4];
      if (j < row_block) {
        mask_before(m, s_i, j);
      } else {
        mask_diagonal(m, s_i, j);
      }
      uint32_t a[4], b[4];
      tile::pack_a<T>(a, m[0], m[1]);
      MAMBA2_UNROLL for (int i = 0; i < kTileP / 16; ++i) {
        tile::load_b_transposed(b, shared.x, 16 * j, 16 * i);
        tile::mma_16x16<T>(y[i][0], y[i][1], a, b);
      }
    }
  }

  // ---- y += D x, y *= silu(z), store ----
  MAMBA2_DEVICE void add_skip() {
    if (params.D.ptr == nullptr) return;
    MAMBA2_UNROLL for (int i = 0; i < kTileP / 8; ++i) {
      const int col = 8 * i + tile::fragment_col();
      const float2 D = *reinterpret_cast<const float2*>(shared.D + col);
      MAMBA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = 16 * row_block + tile::fragment_row() + 8 * half;
        const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t*>(shared.x.at(row, col)));
        float (&r)[4] = y[i / 2][i % 2];
        r[2 * half] += D.x * x.x, r[2 * half + 1] += D.y * x.y;
      }
    }
  }
  // This lane's units of z or dy; 0 beyond the chunk and p.
  using Units = uint4[kTileP / 16];
  MAMBA2_DEVICE void load_units(Units& units, const Strided& tensor, int item) const {
    const int row = 16 * row_block + tile::unit_row(), p_base = channel(item) + tile::unit_col();
    const T* g = rows_of(tensor, head(item), p_base) + row * tensor.l;
    MAMBA2_UNROLL for (int i = 0; i < kTileP / 16; ++i) {
      const bool mine = row < work.count && p_base + 16 * i < params.p;
      units[i] = mine ? *reinterpret_cast<const uint4*>(g + 16 * i) : uint4{0, 0, 0, 0};
    }
  }
  struct GateUnits {
    Units z, dy;
  };
  MAMBA2_DEVICE T* row_to(const StridedOut& out, int item, int row) const {
    const int64_t token = work.token + row;
    return static_cast<T*>(out.ptr) + work.row * out.b + token * out.l + head(item) * out.h +
           channel(item);
  }
  MAMBA2_DEVICE void store(int item, const GateUnits& gate) {
    const int row = 16 * row_block + tile::unit_row(), p_base = channel(item);
    T* g_y = row_to(params.y, item, row);
    const T* g_z = Tile::kGateBackward || params.z.ptr == nullptr
                       ? nullptr
                       : rows_of(params.z, head(item), p_base) + row * params.z.l;
    MAMBA2_UNROLL for (int i = 0; i < kTileP / 16; ++i) {
      const int col = 16 * i + tile::unit_col();
      const bool mine = row < work.count && p_base + col < params.p;
      if constexpr (Tile::kGateBackward) {
        float z[2][4], dy[2][4];
        tile::from_unit<T>(z[0], z[1], gate.z[i]);
        tile::from_unit<T>(dy[0], dy[1], gate.dy[i]);
        gate_gradients(y[i], z, dy);
        const uint4 dz = tile::to_unit<T>(z[0], z[1]);
        if (mine) *reinterpret_cast<uint4*>(row_to(params.dz, item, row) + col) = dz;
      } else if (g_z != nullptr) {
        float z[2][4];
        const uint4 unit = mine ? *reinterpret_cast<const uint4*>(g_z + col) : uint4{0, 0, 0, 0};
        tile::from_unit<T>(z[0], z[1], unit);
        apply_gate(y[i], z);
      }
      const uint4 unit = tile::to_unit<T>(y[i][0], y[i][1]);
      if (mine) *reinterpret_cast<uint4*>(g_y + col) = unit;
    }
  }
};

template <int n>
MAMBA2_DEVICE void clear(float (&blocks)[n][2][4]) {
  MAMBA2_UNROLL for (auto& block : blocks) {
    MAMBA2_UNROLL for (int e = 0; e < 8; ++e) block[e / 4][e % 4] = 0.f;
  }
}

template <class Tile>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, Tile::kBlocksPerSM)
    chunk_scan_kernel(MAMBA2_GRID_CONSTANT const ChunkScanParams params) {
  auto& shared = *static_cast<typename Tile::Shared*>(ptx::dynamic_smem());
  if (params.chunking.table) ptx::griddepcontrol_wait();
  if (threadIdx.x < kMaxItems) find_work<Tile::kTileP>(params, shared.work, threadIdx.x);
  __syncthreads();
  if (shared.work.count == 0) return;

  const int warp = threadIdx.x / 32;
  Scan<Tile> scan{params, shared, shared.work,
                  warp < kWarps / 2 ? warp : kWarps + kWarps / 2 - 1 - warp};
  // Inputs first: only states, delta and a_cumsum come from the kernels before this one.
  MAMBA2_UNROLL for (int i = 0; i < kStages; ++i) scan.load_C_and_B(scan.slice_after(0, 0, i), i);
  scan.load_x(0);
  ptx::griddepcontrol_wait();
  MAMBA2_UNROLL for (int i = 0; i < kStages; ++i) {
    scan.load_S(scan.slice_after(0, 0, i), i);
    ptx::cp_async_commit_group();
  }
  scan.load_steps(0);
  ptx::cp_async_commit_group();

  // Groups are committed in the order slice, slice, item, so that leaving one in flight always
  // finds the awaited one landed.
  clear(scan.CB);
  MAMBA2_NO_UNROLL for (int item = 0; item < shared.work.items; ++item) {
    clear(scan.y);
    typename Scan<Tile>::GateUnits gate;
    if constexpr (Tile::kGateBackward) {  // early: there are registers enough
      scan.load_units(gate.z, params.z, item);
      scan.load_units(gate.dy, params.dy, item);
    }
    MAMBA2_NO_UNROLL for (int i = 0; i < scan.slices(); ++i) {
      const int stage = (item * scan.slices() + i) % kStages;
      ptx::cp_async_wait_group<1>();
      __syncthreads();
      scan.multiply_slice(stage, item == 0);
      __syncthreads();
      const auto next = scan.slice_after(item, i, kStages);
      scan.load_C_and_B(next, stage);
      scan.load_S(next, stage);
      ptx::cp_async_commit_group();
    }
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    scan.form_weights(item);
    __syncthreads();
    scan.multiply_chunk();
    scan.add_skip();
    scan.store(item, gate);
    __syncthreads();
    scan.load_x(item + 1);
    scan.load_steps(item + 1);
    ptx::cp_async_commit_group();
  }
}

template <class T, int tile_p, bool gate_backward>
int run(ChunkScanParams params, int64_t chunks, const Device& device, void* stream) {
  using Tile = ScanTile<T, tile_p, gate_backward>;
  const int groups = params.h / params.heads_per_group;
  params.p_tiles = ceil_div(params.p, tile_p);
  params.items_per_group = params.heads_per_group * params.p_tiles;
  params.items_per_block = choose_items(params.items_per_group, chunks * groups,
                                        int64_t(Tile::kBlocksPerSM) * device.sm_count);
  params.blocks_per_group = ceil_div(params.items_per_group, params.items_per_block);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(chunks * groups * params.blocks_per_group));
  at.threads = kThreads;
  at.smem_bytes = sizeof(typename Tile::Shared);
  at.programmatic = device.major >= 9;
  at.tile = {q, tile_p, kSlice, kStages};
  return launch(chunk_scan_kernel<Tile>, at, stream, params);
}

template <class T, bool gate_backward>
int choose_tile_p(const ChunkScanParams& params, int64_t chunks, const Device& device,
                  void* stream) {
  switch (head_dim_tile(params.p, device)) {
    case 32:
      return run<T, 32, gate_backward>(params, chunks, device, stream);
    case 64:
      return run<T, 64, gate_backward>(params, chunks, device, stream);
    default:
      return run<T, 80, gate_backward>(params, chunks, device, stream);
  }
}

template <bool gate_backward>
int run(const Inputs& in, ChunkScanParams params, const Chunking& chunking, const Device& device,
        void* stream) {
  params.x = in.x, params.B = in.B, params.C = in.C, params.z = in.z;
  params.D = in.D, params.D_per_channel = in.D_per_channel;
  params.chunking = chunking;
  params.h = in.shape.h, params.p = in.shape.p, params.n = in.shape.n;
  params.heads_per_group = in.shape.heads_per_group();
  const int64_t chunks = in.shape.chunks(q);
  return in.dtype == DType::bf16
             ? choose_tile_p<bf16, gate_backward>(params, chunks, device, stream)
             : choose_tile_p<f16, gate_backward>(params, chunks, device, stream);
}

}  // namespace

int chunk_scan(const ForwardParams& forward, const Chunking& chunking, const float* delta,
               const float* a_cumsum_log2, const void* states, const Device& device, void* stream) {
  const Range range("chunk_scan");
  ChunkScanParams params{};
  params.states = states, params.delta = delta, params.a_cumsum_log2 = a_cumsum_log2;
  params.y = forward.y;
  return run<false>(forward.in, params, chunking, device, stream);
}

int chunk_scan_gate_backward(const Inputs& in, const GateBackward& gate, const Chunking& chunking,
                             const float* delta, const float* a_cumsum_log2, const void* states,
                             const Device& device, void* stream) {
  const Range range("chunk_scan gate_backward");
  ChunkScanParams params{};
  params.states = states, params.delta = delta, params.a_cumsum_log2 = a_cumsum_log2;
  params.dy = gate.dy, params.dz = gate.dz, params.y = gate.d_y;
  params.image_n = gate.image_n;
  params.images = in.shape.chunks(q) * in.shape.h * ceil_div(in.shape.p, 64);
  return run<true>(in, params, chunking, device, stream);
}

}  // namespace mamba2::ssd::sm80
