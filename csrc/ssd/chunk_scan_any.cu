// chunk_scan, any type and size: the output of a chunk from the state S that enters it.
//   y_i = u_i S C_i + sum_{j <= i} L_ij delta_j (C_i . B_j) x_j + D x_i,   then y_i silu(z_i)
// In the backward with a gate the same kernel stores dz_i = dy_i y'_i silu'(z_i), y' before the
// gate. Grid: chunk and head. Shared memory: 45 KB (fp64). Bound by the fp32 (fp64) pipes and by
// shared-memory reads.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U>
struct Shared {
  Decays<U> decays;
  U scores[kTile][kTile + 1];
  Slabs<U> slabs;
};

template <class T, bool kGateGradient>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm<accumulator_t<T>>)
    chunk_scan_any(ChunkScanParams params) {
  using U = accumulator_t<T>;
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const Inputs& in = params.work.in;
  const Shape& shape = in.shape;
  const int i_h = blockIdx.x % shape.h, i_g = i_h / shape.heads_per_group();
  const int i_chunk = blockIdx.x / shape.h;
  const Chunk chunk = params.work.chunking.at(i_chunk);
  if (chunk.i_seq < 0) return;
  const auto B = rows_of<T>(in.B, chunk, i_g, shape.n), C = rows_of<T>(in.C, chunk, i_g, shape.n);
  const auto x = rows_of<T>(in.x, chunk, i_h, shape.p);
  const auto z = in.z ? rows_of<T>(in.z, chunk, i_h, shape.p) : Rows<T>{};
  const auto state =
      state_of(static_cast<const U*>(params.states), int64_t(i_chunk) * shape.h + i_h, shape);

  load_decays(s.decays, in, chunk, i_h);
  fill_mask(s.scores, s.decays);
  Tile<U> scores;
  matmul(scores, s.slabs, shape.n, C, B);  // (i, j) = C_i . B_j
  scores.each([&](int i, int j, U v) {
    s.scores[i][j] = i >= j ? v * s.scores[i][j] * s.decays.delta[j] : U(0);
  });

  T* g_y = first_of<T>(params.y, chunk, i_h);
  for (int p0 = 0; p0 < shape.p; p0 += kTile) {
    Tile<U> y;
    matmul(y, s.slabs, shape.n, scaled(C, s.decays.from_start), state.from_row(p0));
    matmul(y, s.slabs, chunk.count, SharedTile<U>{s.scores}, transposed(x.from_column(p0)));
    y.each([&](int i, int c, U v) {
      const int i_p = p0 + c;
      if (i >= chunk.count || i_p >= shape.p) return;
      v += skip_weight<U>(in, i_h, i_p) * x(i, i_p);
      if constexpr (kGateGradient) {
        const U dy = rows_of<T>(params.dy, chunk, i_h, shape.p)(i, i_p);
        v *= dy * silu_gradient(z(i, i_p));
      } else if (z.first) {
        v *= silu(z(i, i_p));
      }
      g_y[i * params.y.l + i_p] = convert<T>(v);
    });
  }
}

template <bool kGateGradient>
int run(const ChunkScanParams& params, void* stream) {
  return with_type(params.work.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(params.work.chunks * params.work.in.shape.h);
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<accumulator_t<T>>);
    at.tile.tokens = kTile;
    return launch(chunk_scan_any<T, kGateGradient>, at, stream, params);
  });
}

}  // namespace

int chunk_scan(const ChunkScanParams& params, void* stream) {
  const Range range("chunk_scan");
  return run<false>(params, stream);
}
int chunk_scan_gate_gradient(const ChunkScanParams& params, void* stream) {
  const Range range("chunk_scan_gate_gradient");
  return run<true>(params, stream);
}

}  // namespace mamba2::ssd::any
