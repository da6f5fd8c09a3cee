// state_gradients: chunk_state and state_passing backwards, in one sweep from the last chunk of a
// sequence to the first:
//   G_prev = 2^s_q G + sum_i 2^s_i dy_i C_i^T,   and   K = 2^s_q <G, S>
// writes the gradient G of the state that LEAVES each chunk, rounded to the dtype, and that of the
// initial state in fp32. G stays in fp32 accumulators from the last token to the first, and K takes
// it from there.
//
// grid: (sequence, slice of p, slice of n, head), heads fastest, so that blocks of one group share
// C in L2. A block owns 64 x kN of G; a warp 16 x 64. sum_i w_i dy_i C_i^T is a product with dy
// transposed as the A operand, whose columns (the tokens) are weighted in registers. Two stages of
// (dy, C), a chunk each: 98 KB at kN 128, two blocks an SM. Narrow slices double the blocks where
// they are few; the bits are the same.
// Bound by HBM (dy and S read, G written), and where b h is small by the latency of a step.
#include "../core/launch.h"
#include "tiles_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int kP = 64, kWarpN = 64, kTiles = kWarpN / 16, kWarpsP = kP / 16;

struct GradientParams {
  StateGradients scan;
  Chunking chunking;
  int chunks, h, heads_per_group, p, n;
  const float* a_cumsum_log2;  // (chunks, h, q)
};

template <class T, int kN>
struct GradientShared {
  static constexpr int kWarpsN = kN / kWarpN;
  struct Stage {
    tile::SharedTile<T, q, kP> dy;
    tile::SharedTile<T, q, kN> C;
    float weight[q];            // 2^s_i
    float decay;                // 2^s_q
    float K[kWarpsN][kWarpsP];  // shares of the warps
  };
  Stage stage[2];
};

// The block's and the warp's place in the state of a head of a sequence.
struct Place {
  int i_seq, i_h, p0, n0, warp_p, warp_n;
  template <int kN>
  static MAMBA2_DEVICE Place of(const GradientParams& params) {
    const int slices_n = ceil_div(params.n, kN), slices_p = ceil_div(params.p, kP);
    const int i_h = blockIdx.x % params.h, i = blockIdx.x / params.h, warp = threadIdx.x / 32;
    return {i / slices_n / slices_p, i_h,           i / slices_n % slices_p * kP, i % slices_n * kN,
            warp % kWarpsP,          warp / kWarpsP};
  }
  MAMBA2_DEVICE int m() const { return 16 * warp_p; }
  MAMBA2_DEVICE int n() const { return kWarpN * warp_n; }
  // Parts of K: of 64 rows and 64 columns each, whatever a block owns.
  MAMBA2_DEVICE int part(const GradientParams& params, int column_slice) const {
    return p0 / kP * ceil_div(params.n, kWarpN) + n0 / kWarpN + column_slice;
  }
};

// A warp's (16, 64) of G.
struct Gradient {
  float left[kTiles][4] = {}, right[kTiles][4] = {};

  // Calls f(index in (p, n), pair of values) for what lies inside the state.
  template <class F>
  MAMBA2_DEVICE void for_pairs(const GradientParams& params, const Place& at, F f) {
    MAMBA2_UNROLL for (int i = 0; i < 2 * kTiles; ++i) {
      MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
        const int row = at.p0 + at.m() + tile::fragment_row() + 8 * r;
        const int column = at.n0 + at.n() + 8 * i + tile::fragment_col();
        float* pair = (i % 2 ? right : left)[i / 2] + 2 * r;
        if (row < params.p && column < params.n) f(int64_t(row) * params.n + column, pair);
      }
    }
  }
};

// ---- one chunk ----
template <class T, int kN>
MAMBA2_DEVICE void start_chunk(typename GradientShared<T, kN>::Stage& stage,
                               const GradientParams& params, const Place& at, int i_chunk) {
  const Chunk chunk = params.chunking.at(i_chunk);
  const Strided &dy = params.scan.dy, &C = params.scan.C;
  tile::copy_async<2 * kN>(stage.dy, rows_of<T>(dy, chunk, at.i_h) + at.p0, dy.l, chunk.count,
                           params.p - at.p0);
  tile::copy_async<2 * kN>(stage.C, rows_of<T>(C, chunk, at.i_h / params.heads_per_group) + at.n0,
                           C.l, chunk.count, params.n - at.n0);
}
// s_i of token threadIdx.x of the chunk.
MAMBA2_DEVICE float load_s(const GradientParams& params, const Place& at, int i_chunk) {
  const int i = threadIdx.x;
  return i < q ? params.a_cumsum_log2[(int64_t(i_chunk) * params.h + at.i_h) * q + i] : 0.f;
}
template <class Stage>
MAMBA2_DEVICE void store_weight(Stage& stage, float s) {
  const int i = threadIdx.x;
  if (i < q) stage.weight[i] = ptx::ex2(s);
  if (i == q - 1) stage.decay = ptx::ex2(s);
}

// Where this lane's 16-byte units of a (chunks, h, p, n) array lie, and which are inside the state.
struct Units {
  int row, column;
  MAMBA2_DEVICE explicit Units(const Place& at)
      : row(at.p0 + at.m() + tile::unit_row()), column(at.n0 + at.n() + tile::unit_col()) {}
  MAMBA2_DEVICE bool valid(const GradientParams& params, int i) const {
    return row < params.p && column + 16 * i < params.n;
  }
  MAMBA2_DEVICE int64_t at(const GradientParams& params, int i_h, int i_chunk) const {
    const int64_t base = (int64_t(i_chunk) * params.h + i_h) * params.p;
    return (base + row) * params.n + column;
  }
};

// S of a chunk: in flight while the chunk after it is computed with.
template <class T>
MAMBA2_DEVICE void load_S(uint4 (&S)[kTiles], const GradientParams& params, const Place& at,
                          int i_chunk) {
  const Units units(at);
  const T* from = static_cast<const T*>(params.scan.S) + units.at(params, at.i_h, i_chunk);
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) S[i] =
      units.valid(params, i) ? *reinterpret_cast<const uint4*>(from + 16 * i) : uint4{0, 0, 0, 0};
}

// G, rounded, to global memory; this warp's share of K to shared memory.
template <class T, class Stage>
MAMBA2_DEVICE void store_state(const Gradient& G, const uint4 (&S)[kTiles], Stage& stage,
                               const GradientParams& params, const Place& at, int i_chunk) {
  const Units units(at);
  T* to = static_cast<T*>(params.scan.G) + units.at(params, at.i_h, i_chunk);
  float dot = 0;
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
    const uint4 unit = tile::to_unit<T>(G.left[i], G.right[i]);
    if (units.valid(params, i)) *reinterpret_cast<uint4*>(to + 16 * i) = unit;
    float left[4], right[4];
    tile::from_unit<T>(left, right, S[i]);
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) dot +=
        G.left[i][e] * left[e] + G.right[i][e] * right[e];
  }
  dot = warp_sum(dot);
  if (tile::lane() == 0) stage.K[at.warp_n][at.warp_p] = stage.decay * dot;
}

// K of the chunk, by the first threads, once all warps have left their shares.
template <int kN, class Stage>
MAMBA2_DEVICE void store_K(const Stage& stage, const GradientParams& params, const Place& at,
                           int i_chunk) {
  const int slice = threadIdx.x;
  if (slice >= kN / kWarpN || at.n0 + kWarpN * slice >= params.n) return;
  float sum = 0;
  for (int w = 0; w < kWarpsP; ++w) sum += stage.K[slice][w];
  const int64_t part = at.part(params, slice);
  params.scan.K[(part * params.chunks + i_chunk) * params.h + at.i_h] = sum;
}

// G = 2^s_q G + sum_i 2^s_i dy_i C_i^T
template <class T, class Stage>
MAMBA2_DEVICE void advance(Gradient& G, const Stage& stage, const Place& at) {
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) {
      G.left[i][e] *= stage.decay;
      G.right[i][e] *= stage.decay;
    }
  }
  MAMBA2_NO_UNROLL for (int k = 0; k < q; k += 16) {
    uint32_t a[4], b[4];
    tile::load_a_transposed(a, stage.dy, k, at.m());
    tile::scale_columns<T>(a, stage.weight + k);
    MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
      tile::load_b_transposed(b, stage.C, k, at.n() + 16 * i);
      tile::mma_16x16<T>(G.left[i], G.right[i], a, b);
    }
  }
}

template <class T, int kN>
__global__ void MAMBA2_LAUNCH_BOUNDS(2 * kN, kN == 128 ? 2 : 3)
    state_gradients_kernel(const MAMBA2_GRID_CONSTANT GradientParams params) {
  auto& shared = *static_cast<GradientShared<T, kN>*>(ptx::dynamic_smem());
  const Place at = Place::of<kN>(params);
  const int first = params.chunking.first(at.i_seq), count = params.chunking.count(at.i_seq);
  const int64_t base = (int64_t(at.i_seq) * params.h + at.i_h) * params.p * params.n;

  Gradient G;
  if (params.scan.d_final_states) {
    G.for_pairs(params, at, [&](int64_t i, float* pair) {
      const float2 v = *reinterpret_cast<const float2*>(params.scan.d_final_states + base + i);
      pair[0] = v.x, pair[1] = v.y;
    });
  }
  uint4 S[kTiles];
  if (count > 0) {
    load_S<T>(S, params, at, first + count - 1);
    start_chunk<T, kN>(shared.stage[0], params, at, first + count - 1);
    store_weight(shared.stage[0], load_s(params, at, first + count - 1));
  }
  for (int i = 0; i < count; ++i) {
    auto& stage = shared.stage[i & 1];
    auto& other = shared.stage[~i & 1];
    const int i_chunk = first + count - 1 - i;
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this stage is full, the other one no longer read
    if (i > 0) store_K<kN>(other, params, at, i_chunk + 1);
    float s = 0;
    if (i + 1 < count) {
      start_chunk<T, kN>(other, params, at, i_chunk - 1);
      s = load_s(params, at, i_chunk - 1);
    }
    store_state<T>(G, S, stage, params, at, i_chunk);
    if (i + 1 < count) load_S<T>(S, params, at, i_chunk - 1);
    advance<T>(G, stage, at);
    if (i + 1 < count) store_weight(other, s);
  }
  __syncthreads();
  if (count > 0) store_K<kN>(shared.stage[~count & 1], params, at, first);
  if (params.scan.d_initial_states) {
    G.for_pairs(params, at, [&](int64_t i, float* pair) {
      *reinterpret_cast<float2*>(params.scan.d_initial_states + base + i) =
          float2{pair[0], pair[1]};
    });
  }
}

template <class T, int kN>
int run(const GradientParams& params, int64_t sequences, void* stream) {
  const int64_t slices = ceil_div(params.p, kP) * ceil_div(params.n, kN);
  const LaunchShape at{dim3(static_cast<unsigned>(sequences * slices * params.h)), 2 * kN,
                       sizeof(GradientShared<T, kN>)};
  return launch(state_gradients_kernel<T, kN>, at, stream, params);
}
template <class T>
int run(const GradientParams& params, int64_t sequences, int sm_count, void* stream) {
  const int64_t wide = sequences * params.h * ceil_div(params.p, kP) * ceil_div(params.n, 128);
  return params.n > 64 && wide >= 2 * sm_count ? run<T, 128>(params, sequences, stream)
                                               : run<T, 64>(params, sequences, stream);
}

}  // namespace

int state_gradients_parts(const Shape& shape) {
  return ceil_div(shape.p, kP) * ceil_div(shape.n, kWarpN);
}

int state_gradients(const BackwardProblem& problem, const StateGradients& scan, void* stream) {
  const Range range("state_gradients");
  const Shape& shape = problem.shape;
  const GradientParams params{scan,    problem.chunking,        problem.chunks,
                              shape.h, shape.heads_per_group(), shape.p,
                              shape.n, problem.a_cumsum_log2};
  return problem.dtype == DType::bf16 ? run<bf16>(params, shape.nseq, problem.sm_count, stream)
                                      : run<f16>(params, shape.nseq, problem.sm_count, stream);
}

}  // namespace mamba2::ssd::sm80
