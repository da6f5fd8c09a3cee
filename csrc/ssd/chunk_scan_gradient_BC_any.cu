// chunk_scan backwards, any type and size: the gradients of B and C, which the heads of a group
// share. S enters the chunk, G is the gradient of the state that leaves it; sums over the heads.
//   dCB_ij = sum_h L_ij delta_j (dy_i . x_j)
//   dC_i   = sum_h u_i S^T dy_i + sum_{j <= i} dCB_ij B_j
//   dB_j   = sum_h delta_j w_j G^T x_j + sum_{i >= j} dCB_ij C_i
// The block visits its heads one after another, so the sum has one order. They are all heads of the
// group, and the sum needs no buffer; or, where that makes too few blocks, a slice of them, and
// sum_over_slices adds up the slices.
// Grid: (chunk, group and slice, 64 columns of n). Shared memory: 45 KB (fp64). Bound by the fp32
// (fp64) pipes and by shared-memory reads.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U>
struct Shared {
  Decays<U> decays;
  U pairs[kTile][kTile + 1];  // L of one head, then dCB
  Slabs<U> slabs;
};

// Rows of a tile to a (b, l, g, n) tensor, from column n0 on.
template <class T, class U>
MAMBA2_DEVICE void store_rows(const StridedOut& out, const Chunk& chunk, int i_g, int n, int n0,
                              Tile<U>& tile) {
  T* g_out = first_of<T>(out, chunk, i_g);
  tile.each([&](int i, int c, U v) {
    if (i < chunk.count && n0 + c < n) g_out[i * out.l + n0 + c] = convert<T>(v);
  });
}

// The same of one slice: row 0 of the chunk and group lies at `out`.
template <class U>
MAMBA2_DEVICE void store_slice(U* out, int count, int n, int n0, Tile<U>& tile) {
  tile.each([&](int i, int c, U v) {
    if (i < count && n0 + c < n) out[i * n + n0 + c] = v;
  });
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    chunk_scan_gradient_BC_any(ChunkScanGradientParams params) {
  using U = accumulator_t<T>;
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const Inputs& in = params.work.in;
  const Shape& shape = in.shape;
  const int64_t chunk_group = blockIdx.x / params.slices, i_slice = blockIdx.x % params.slices;
  const int i_g = chunk_group % shape.g;
  const int64_t i_chunk = chunk_group / shape.g;
  const int n0 = blockIdx.y * kTile;
  const Chunk chunk = params.work.chunking.at(i_chunk);
  if (chunk.i_seq < 0) return;

  Tile<U> dCB, dC, dB;
  const int heads = shape.heads_per_group(), first_head = i_g * heads;
  const int end = first_head + int((i_slice + 1) * heads / params.slices);
  MAMBA2_NO_UNROLL
  for (int i_h = first_head + int(i_slice * heads / params.slices); i_h < end; ++i_h) {
    const auto x = rows_of<T>(in.x, chunk, i_h, shape.p);
    const auto dy = upstream_of<T>(params.dy, in, chunk, i_h);
    const int64_t i_state = i_chunk * shape.h + i_h;
    const auto S = state_of(static_cast<const U*>(params.states), i_state, shape);
    const auto G = state_of(static_cast<const U*>(params.d_states), i_state, shape);
    load_decays(s.decays, in, chunk, i_h);
    fill_mask(s.pairs, s.decays);
    Tile<U> products;
    matmul(products, s.slabs, shape.p, dy, x);  // (i, j) = dy_i . x_j
    dCB.with(products, [&](int i, int j, U& sum, U v) {
      if (i >= j) sum += s.pairs[i][j] * s.decays.delta[j] * v;
    });
    matmul(dC, s.slabs, shape.p, scaled(dy, s.decays.from_start), transposed(S.from_column(n0)));
    matmul(dB, s.slabs, shape.p, scaled(x, s.decays.weight), transposed(G.from_column(n0)));
  }

  __syncthreads();
  dCB.each([&](int i, int j, U v) { s.pairs[i][j] = v; });
  const auto B = rows_of<T>(in.B, chunk, i_g, shape.n).from_column(n0);
  const auto C = rows_of<T>(in.C, chunk, i_g, shape.n).from_column(n0);
  matmul(dC, s.slabs, chunk.count, SharedTile<U>{s.pairs}, transposed(B));
  matmul(dB, s.slabs, chunk.count, transposed(SharedTile<U>{s.pairs}), transposed(C));
  if (params.slices == 1) {
    store_rows<T>(params.dC, chunk, i_g, shape.n, n0, dC);
    store_rows<T>(params.dB, chunk, i_g, shape.n, n0, dB);
    return;
  }
  const int64_t chunk_groups = params.work.chunks * shape.g;
  const int64_t at = (i_slice * chunk_groups + chunk_group) * kChunk * shape.n;
  store_slice(static_cast<U*>(params.dC_slices) + at, chunk.count, shape.n, n0, dC);
  store_slice(static_cast<U*>(params.dB_slices) + at, chunk.count, shape.n, n0, dB);
}

}  // namespace

int chunk_scan_gradient_BC(const ChunkScanGradientParams& params, void* stream) {
  const Range range("chunk_scan_gradient_BC");
  const Shape& shape = params.work.in.shape;
  return with_type(params.work.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(params.work.chunks * shape.g * params.slices, ceil_div(shape.n, kTile));
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<accumulator_t<T>>);
    at.tile.tokens = kTile;
    return launch(chunk_scan_gradient_BC_any<T>, at, stream, params);
  });
}

}  // namespace mamba2::ssd::any
