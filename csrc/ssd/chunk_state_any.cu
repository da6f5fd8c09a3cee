// chunk_state, any type and size: what each chunk adds to the state, as if it entered with none.
//   states[c, h] = sum_j w_j x_j B_j^T,   w_j = delta_j exp(sum of delta A over tokens after j)
// and its mirror image in the backward, the gradient of the state entering the chunk:
//   states[c, h] = sum_i u_i dy_i C_i^T,  u_i = exp(sum of delta A over tokens up to i)
// Grid: (chunk and head, 64 x 64 tile of (p, n)). Shared memory: 12 KB (fp64). Bound by the fp32
// (fp64) pipes and by shared-memory reads, 8 for 16 multiply-adds.
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "chunk_any.cuh"
#include "stages_any.h"

namespace mamba2::ssd::any {
namespace {

template <class U>
struct Shared {
  Decays<U> decays;
  Slabs<U> slabs;
};

template <class T, bool kGradient>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm<accumulator_t<T>>)
    chunk_state_any(ChunkStateParams params) {
  using U = accumulator_t<T>;
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const Inputs& in = params.work.in;
  const Shape& shape = in.shape;
  const int i_h = blockIdx.x % shape.h;
  const int i_chunk = blockIdx.x / shape.h;
  const int tiles_n = ceil_div(shape.n, kTile);
  const int p0 = blockIdx.y / tiles_n * kTile, n0 = blockIdx.y % tiles_n * kTile;
  const Chunk chunk = params.work.chunking.at(i_chunk);
  if (chunk.i_seq < 0) return;

  load_decays(s.decays, in, chunk, i_h);
  const int i_g = i_h / shape.heads_per_group();
  Tile<U> state;
  if constexpr (kGradient) {
    const auto C = rows_of<T>(in.C, chunk, i_g, shape.n).from_column(n0);
    const auto dy = upstream_of<T>(params.dy, in, chunk, i_h).from_column(p0);
    matmul(state, s.slabs, chunk.count, transposed(scaled(dy, s.decays.from_start)), transposed(C));
  } else {
    const auto B = rows_of<T>(in.B, chunk, i_g, shape.n).from_column(n0);
    const auto x = rows_of<T>(in.x, chunk, i_h, shape.p).from_column(p0);
    matmul(state, s.slabs, chunk.count, transposed(scaled(x, s.decays.weight)), transposed(B));
  }

  const int64_t i_state = int64_t(i_chunk) * shape.h + i_h;
  U* g_state = static_cast<U*>(params.states) + i_state * shape.p * shape.n;
  state.each([&](int r, int c, U v) {
    const int i_p = p0 + r, i_n = n0 + c;
    if (i_p < shape.p && i_n < shape.n) g_state[i_p * shape.n + i_n] = v;
  });
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    static_cast<U*>(params.decay)[i_state] = s.decays.of_chunk();
  }
}

template <bool kGradient>
int run(const ChunkStateParams& params, void* stream) {
  const Shape& shape = params.work.in.shape;
  return with_type(params.work.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape at;
    at.grid =
        dim3(params.work.chunks * shape.h, ceil_div(shape.p, kTile) * ceil_div(shape.n, kTile));
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<accumulator_t<T>>);
    at.tile.tokens = kTile;
    return launch(chunk_state_any<T, kGradient>, at, stream, params);
  });
}

}  // namespace

int chunk_state(const ChunkStateParams& params, void* stream) {
  const Range range("chunk_state");
  return run<false>(params, stream);
}
int chunk_state_gradient(const ChunkStateParams& params, void* stream) {
  const Range range("chunk_state_gradient");
  return run<true>(params, stream);
}

}  // namespace mamba2::ssd::any
