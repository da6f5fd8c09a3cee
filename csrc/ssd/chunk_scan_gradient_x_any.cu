// chunk_scan backwards, any type and size: the gradients that belong to one head of a chunk.
// S enters the chunk, G is the gradient of the state that leaves it, V_ij = L_ij
// (C_i.B_j)(dy_i.x_j).
//   dx_j       = delta_j [ w_j G B_j + sum_{i >= j} L_ij (C_i . B_j) dy_i ] + D dy_j
//   d(delta A)_t = sum_{i >= t > j} V_ij delta_j + sum_{i >= t} u_i dy_i.(S C_i)
//                + sum_{j < t} delta_j f_j + <u_q S, G>            f_j = w_j x_j . (G B_j)
//   d delta_j  = f_j + sum_{i >= j} V_ij + A d(delta A)_j
// u: decay since the chunk's start, w: decay until its end. Every sum over pairs is formed from the
// pairs it names, nothing is obtained as a difference, so strong decay costs no accuracy.
// Also the chunk's part of dA, d_dt_bias and dD.
// Grid: chunk and head. Shared memory: 46 KB (fp64). Bound by the fp32 (fp64) pipes and by
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
  U pairs[kTile][kTile + 1];  // L, then L o C B^T, then V
  U f[kChunk];                // w_j x_j . (G B_j)
  U e[kChunk];                // dy_i . (S C_i)
  U warps[kThreads / 32];
  Slabs<U> slabs;
};

template <class U>
MAMBA2_DEVICE U inner_product(const U* a, const U* b, int count, U (&s_warps)[kThreads / 32]) {
  U sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += a[i] * b[i];
  return block_sum(sum, s_warps);
}

// d(delta A) of token t. s.pairs holds sum_{j' <= j} V_ij' delta_j' in column j; `whole` is what
// the chunk's decay as a whole gets.
template <class U>
MAMBA2_DEVICE U exponent_gradient(const Shared<U>& s, int t, U whole) {
  U sum = whole;
  for (int i = t; i < kChunk; ++i) {
    if (t > 0) sum += s.pairs[i][t - 1];
    sum += s.decays.from_start[i] * s.e[i];
  }
  for (int j = 0; j < t; ++j) sum += s.decays.delta[j] * s.f[j];
  return sum;
}

// Stores d_dt of the chunk and its parts of dA and d_dt_bias. s.pairs holds V.
template <class U>
MAMBA2_DEVICE void decay_gradient(Shared<U>& s, const ChunkScanGradientParams& params,
                                  const Chunk& chunk, int i_h, int64_t i_part, U whole) {
  const Inputs& in = params.work.in;
  const int t = threadIdx.x;
  U d_delta = 0;
  if (t < kChunk) {
    for (int i = t; i < kChunk; ++i) d_delta += s.pairs[i][t];
  }
  __syncthreads();
  if (t < kChunk) {
    U sum = 0;
    for (int j = 0; j <= t; ++j) s.pairs[t][j] = sum += s.pairs[t][j] * s.decays.delta[j];
  }
  __syncthreads();
  U dA = 0, d_raw = 0;
  if (t < chunk.count) {
    const U d_exponent = exponent_gradient(s, t, whole);
    d_delta += s.f[t] + load<U>(in.A, i_h) * d_exponent;
    dA = s.decays.delta[t] * d_exponent;
    d_raw = d_delta * s.decays.slope[t];
    const StridedOut& out = params.d_dt;
    store(out.ptr, in.dt_dtype, chunk.row * out.b + (chunk.token + t) * out.l + i_h * out.h, d_raw);
  }
  dA = block_sum(dA, s.warps);
  d_raw = block_sum(d_raw, s.warps);
  if (t == 0) {
    static_cast<U*>(params.dA)[i_part] = dA;
    static_cast<U*>(params.d_dt_bias)[i_part] = d_raw;
  }
}

// dD of the chunk, channel by channel.
template <class T, class U>
MAMBA2_DEVICE void skip_gradient(const Upstream<T>& dy, const Rows<T>& x, U* dD) {
  for (int i_p = threadIdx.x; i_p < x.width; i_p += kThreads) {
    U sum = 0;
    for (int i = 0; i < x.count; ++i) sum += dy(i, i_p) * x(i, i_p);
    dD[i_p] = sum;
  }
}

// A chunk that does not exist adds nothing.
template <class U>
MAMBA2_DEVICE void store_no_parts(const ChunkScanGradientParams& params, int64_t i_part, int p) {
  if (threadIdx.x == 0) {
    static_cast<U*>(params.dA)[i_part] = 0;
    static_cast<U*>(params.d_dt_bias)[i_part] = 0;
  }
  if (!params.dD) return;
  for (int i_p = threadIdx.x; i_p < p; i_p += kThreads) {
    static_cast<U*>(params.dD)[i_part * p + i_p] = 0;
  }
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    chunk_scan_gradient_x_any(ChunkScanGradientParams params) {
  using U = accumulator_t<T>;
  auto& s = *static_cast<Shared<U>*>(ptx::dynamic_smem());
  const Inputs& in = params.work.in;
  const Shape& shape = in.shape;
  const int i_h = blockIdx.x % shape.h, i_g = i_h / shape.heads_per_group();
  const int64_t i_part = blockIdx.x;  // (chunk, head)
  const Chunk chunk = params.work.chunking.at(blockIdx.x / shape.h);
  if (chunk.i_seq < 0) return store_no_parts<U>(params, i_part, shape.p);
  const auto B = rows_of<T>(in.B, chunk, i_g, shape.n), C = rows_of<T>(in.C, chunk, i_g, shape.n);
  const auto x = rows_of<T>(in.x, chunk, i_h, shape.p);
  const auto dy = upstream_of<T>(params.dy, in, chunk, i_h);
  const auto S = state_of(static_cast<const U*>(params.states), i_part, shape);
  const auto G = state_of(static_cast<const U*>(params.d_states), i_part, shape);

  load_decays(s.decays, in, chunk, i_h);
  fill_mask(s.pairs, s.decays);
  if (threadIdx.x < kChunk) s.e[threadIdx.x] = s.f[threadIdx.x] = 0;
  U whole = s.decays.of_chunk() * inner_product(S.first, G.first, shape.p * shape.n, s.warps);
  if (params.d_log_decay) {
    whole += static_cast<const U*>(params.d_log_decay)[int64_t(chunk.i_seq) * shape.h + i_h];
  }

  Tile<U> scores, V;
  matmul(scores, s.slabs, shape.n, C, B);  // (i, j) = C_i . B_j
  matmul(V, s.slabs, shape.p, dy, x);      // (i, j) = dy_i . x_j
  scores.each([&](int i, int j, U& v) { v = i >= j ? s.pairs[i][j] * v : U(0); });
  V.with(scores, [&](int i, int j, U& v, U score) {
    v = i >= j ? v * score : U(0);
    s.pairs[i][j] = score;
  });

  T* g_dx = first_of<T>(params.dx, chunk, i_h);
  for (int p0 = 0; p0 < shape.p; p0 += kTile) {
    Tile<U> dx;
    matmul(dx, s.slabs, shape.n, scaled(B, s.decays.to_end), G.from_row(p0));
    dx.add_row_sums(s.f, [&](int j, int c, U v) { return v * x(j, p0 + c); });
    matmul(dx, s.slabs, chunk.count, transposed(SharedTile<U>{s.pairs}),
           transposed(dy.from_column(p0)));
    dx.each([&](int j, int c, U v) {
      const int i_p = p0 + c;
      if (j >= chunk.count || i_p >= shape.p) return;
      const U skip = skip_weight<U>(in, i_h, i_p) * dy(j, i_p);
      g_dx[j * params.dx.l + i_p] = convert<T>(s.decays.delta[j] * v + skip);
    });
    Tile<U> SC;
    matmul(SC, s.slabs, shape.n, C, S.from_row(p0));  // (i, p) = (S C_i)_p
    SC.add_row_sums(s.e, [&](int i, int c, U v) { return v * dy(i, p0 + c); });
  }

  __syncthreads();
  V.each([&](int i, int j, U v) { s.pairs[i][j] = v; });
  __syncthreads();
  decay_gradient(s, params, chunk, i_h, i_part, whole);
  if (params.dD) skip_gradient(dy, x, static_cast<U*>(params.dD) + i_part * shape.p);
}

}  // namespace

int chunk_scan_gradient_x(const ChunkScanGradientParams& params, void* stream) {
  const Range range("chunk_scan_gradient_x");
  return with_type(params.work.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(params.work.chunks * params.work.in.shape.h);
    at.threads = kThreads;
    at.smem_bytes = sizeof(Shared<accumulator_t<T>>);
    at.tile.tokens = kTile;
    return launch(chunk_scan_gradient_x_any<T>, at, stream, params);
  });
}

}  // namespace mamba2::ssd::any
