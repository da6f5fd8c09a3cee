// state_gradients: chunk_state and state_passing backwards, in one sweep from the last chunk of a
// sequence to the first:
//   G_prev = 2^s_q G + sum_i 2^s_i dy_i C_i^T,   and   K = 2^s_q <G, S>
// writes the gradient G of the state that LEAVES each chunk, rounded to the dtype, and that of the
// initial state in fp32. G stays in fp32 accumulators from the last token to the first, and K takes
// it from there. S of a chunk that lets the state stay it takes in two words, the second of which
// lies where G is to lie; states that the forward kept have one word, but for the first chunk's,
// which comes from initial_states.
// Weights span 64 tokens, half a chunk: those that lie just below 1 all round one way, and the more
// so the more tokens they span.
//
// Long sequences that would leave SMs idle are cut into segments and swept twice, as chunk_state
// is: the first time for what each segment adds to the gradient, less the last chunks if the first
// ones forget them.
//
// grid: (sequence, segment, slice of p, slice of n, head), heads fastest, so that blocks of one
// group share C in L2. A block owns 64 x kN of G; a warp 16 x 64. sum_i w_i dy_i C_i^T is a product
// with dy transposed as the A operand, whose columns (the tokens) are weighted in registers. Two
// stages of (dy, C), a chunk each: 98 KB at kN 128, two blocks an SM. Narrow slices double the
// blocks where they are few; the bits are the same. Bound by HBM (dy and S read, G written), and
// where b h is small by the latency of a step.
#include <type_traits>

#include "../core/launch.h"
#include "segments_sm80.cuh"
#include "tiles_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int kP = 64, kWarpN = 64, kTiles = kWarpN / 16, kWarpsP = kP / 16;
constexpr int kHalf = 64, kHalves = q / kHalf;  // tokens that are weighted together

struct GradientParams {
  StateGradients scan;
  Chunking chunking;
  int chunks, h, heads_per_group, p, n;
  const float* a_cumsum_log2;  // (chunks, h, q)
  Segments segments;
};

// The block's and the warp's place in the state of a head.
struct Place {
  int i_h, p0, n0, warp_p, warp_n;
  template <int kN>
  static MAMBA2_DEVICE Place of(const GradientParams& params) {
    const int slices_n = ceil_div(params.n, kN), slices_p = ceil_div(params.p, kP);
    const int i_h = blockIdx.x % params.h, i = blockIdx.x / params.h, warp = threadIdx.x / 32;
    return {i_h, i / slices_n % slices_p * kP, i % slices_n * kN, warp % kWarpsP, warp / kWarpsP};
  }
  MAMBA2_DEVICE int m() const { return 16 * warp_p; }
  MAMBA2_DEVICE int n() const { return kWarpN * warp_n; }
  // Parts of K: of 64 rows and 64 columns each, whatever a block owns.
  MAMBA2_DEVICE int part(const GradientParams& params, int column_slice) const {
    return p0 / kP * ceil_div(params.n, kWarpN) + n0 / kWarpN + column_slice;
  }
};

// The block's segment: its chunks, where G comes from and goes to, and S of the first chunk before
// its rounding, each (p, n) and optional. A segment that has nothing to do has no chunks and no
// place for G. It lies in shared memory, for the accumulators leave no registers for it.
struct Segment {
  int first, count;
  const float *from, *S_unrounded;
  float* to;
  template <int kN, bool first_pass>
  static MAMBA2_DEVICE Segment of(const GradientParams& params) {
    const Segments& segments = params.segments;
    const StateGradients& scan = params.scan;
    const int i_h = blockIdx.x % params.h;
    const int i = blockIdx.x / params.h / ceil_div(params.n, kN) / ceil_div(params.p, kP);
    const int i_seq = i / segments.count, k = i % segments.count;
    const int all = params.chunking.count(i_seq), in_sequence = segments.of(all);
    const int64_t state = int64_t(params.p) * params.n, heads = params.h * state;
    const auto of_sequence = [&](auto* states) {
      return states ? states + i_seq * heads + i_h * state : nullptr;
    };
    float* slot = segments.carry + i * heads + i_h * state;
    const bool is_first = k == 0, is_last = k == in_sequence - 1;
    Segment segment;
    segment.first = params.chunking.first(i_seq) + k * segments.chunks;
    segment.count = is_last ? all - k * segments.chunks : segments.chunks;
    segment.from = is_last ? of_sequence(scan.d_final_states) : first_pass ? nullptr : slot + heads;
    segment.to = first_pass ? slot : is_first ? of_sequence(scan.d_initial_states) : nullptr;
    segment.S_unrounded = is_first ? of_sequence(scan.initial_states) : nullptr;
    if (k >= in_sequence || (first_pass && is_first)) segment.count = 0, segment.to = nullptr;
    return segment;
  }
};

template <class T, int kN>
struct GradientShared {
  static constexpr int kWarpsN = kN / kWarpN;
  struct Stage {
    tile::SharedTile<T, q, kP> dy;
    tile::SharedTile<T, q, kN> C;
    float weight[q];       // 2^(s_i - s), s at the end of the half before
    float decay[kHalves];  // of a half
    // Shares of the warps. (A vector load of them is not to touch decay, which another thread may
    // be writing.)
    alignas(16) float K[kWarpsN][kWarpsP];
  };
  Stage stage[2];
  Segment segment;
};

// First pass, by one warp: leaves out what the rest of the segment, on the way to its beginning,
// forgets.
MAMBA2_DEVICE void skip_forgotten(Segment& segment, const GradientParams& params, const Place& at) {
  const int count =
      remembered_chunks(params.a_cumsum_log2, segment.first, segment.count, params.h, at.i_h, true);
  __syncwarp();
  if (count == segment.count || threadIdx.x > 0) return;
  segment.count = count, segment.from = nullptr;
}

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
// Token threadIdx.x of the chunk: s there, and at the end of the half before its own.
struct Weight {
  float s = 0.f, s_before = 0.f;
};
MAMBA2_DEVICE Weight load_weight(const GradientParams& params, const Place& at, int i_chunk) {
  const int i = threadIdx.x, half = i / kHalf * kHalf;
  if (i >= q) return {};
  const float* s = params.a_cumsum_log2 + (int64_t(i_chunk) * params.h + at.i_h) * q;
  return {s[i], half > 0 ? s[half - 1] : 0.f};
}
template <class Stage>
MAMBA2_DEVICE void store_weight(Stage& stage, const Weight& w) {
  const int i = threadIdx.x;
  if (i >= q) return;
  const float weight = ptx::ex2(w.s - w.s_before);
  stage.weight[i] = weight;
  if (i % kHalf == kHalf - 1) stage.decay[i / kHalf] = weight;
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

// S of a chunk, or its second word: the first in flight while the chunk after it is computed with.
template <class T>
MAMBA2_DEVICE void load_S(uint4 (&S)[kTiles], const void* states, const GradientParams& params,
                          const Place& at, int i_chunk) {
  const Units units(at);
  const T* from = static_cast<const T*>(states) + units.at(params, at.i_h, i_chunk);
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) S[i] =
      units.valid(params, i) ? *reinterpret_cast<const uint4*>(from + 16 * i) : uint4{0, 0, 0, 0};
}

// <G, S>, with S of a chunk that the forward kept, or its first word and then the other.
template <class T>
MAMBA2_DEVICE float product_with(const Gradient& G, const uint4 (&S)[kTiles]) {
  float dot = 0;
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
    float left[4], right[4];
    tile::from_unit<T>(left, right, S[i]);
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) dot +=
        G.left[i][e] * left[e] + G.right[i][e] * right[e];
  }
  return dot;
}
// G, rounded, to global memory; this warp's share of K to shared memory. S_unrounded, (h, p, n) of
// this sequence, takes the place of S where it is given.
template <class T, class Stage>
MAMBA2_DEVICE void store_state(Gradient& G, const uint4 (&S)[kTiles], const float* S_unrounded,
                               Stage& stage, const GradientParams& params, const Place& at,
                               int i_chunk) {
  const Units units(at);
  T* to = static_cast<T*>(params.scan.G) + units.at(params, at.i_h, i_chunk);
  float dot = product_with<T>(G, S);
  static_assert(kHalves == 2, "the decay of the chunk");
  const float decay = stage.decay[0] * stage.decay[1];
  if (params.scan.S_rests && lets_stay(decay)) {
    uint4 rests[kTiles];
    load_S<T>(rests, params.scan.G, params, at, i_chunk);
    dot += product_with<T>(G, rests);
  }
  MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
    const uint4 unit = tile::to_unit<T>(G.left[i], G.right[i]);
    if (units.valid(params, i)) *reinterpret_cast<uint4*>(to + 16 * i) = unit;
  }
  if (S_unrounded) {
    dot = 0;
    G.for_pairs(params, at, [&](int64_t i, const float* pair) {
      const float2 v = *reinterpret_cast<const float2*>(S_unrounded + i);
      dot += pair[0] * v.x + pair[1] * v.y;
    });
  }
  dot = warp_sum(dot);
  if (tile::lane() == 0) stage.K[at.warp_n][at.warp_p] = decay * dot;
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

// G = 2^s_q G + sum_i 2^s_i dy_i C_i^T, half by half, the later one first.
template <class T, class Stage>
MAMBA2_DEVICE void advance(Gradient& G, const Stage& stage, const Place& at) {
  MAMBA2_NO_UNROLL for (int step = 0; step < q / 16; ++step) {
    const int half = kHalves - 1 - step / (kHalf / 16), k = half * kHalf + step % (kHalf / 16) * 16;
    if (step % (kHalf / 16) == 0) {
      MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
        MAMBA2_UNROLL for (int e = 0; e < 4; ++e) {
          G.left[i][e] *= stage.decay[half];
          G.right[i][e] *= stage.decay[half];
        }
      }
    }
    uint32_t a[4], b[4];
    tile::load_a_transposed(a, stage.dy, k, at.m());
    tile::scale_columns<T>(a, stage.weight + k);
    MAMBA2_UNROLL for (int i = 0; i < kTiles; ++i) {
      tile::load_b_transposed(b, stage.C, k, at.n() + 16 * i);
      tile::mma_16x16<T>(G.left[i], G.right[i], a, b);
    }
  }
}

template <class T, int kN, bool first_pass>
__global__ void MAMBA2_LAUNCH_BOUNDS(2 * kN, kN == 128 ? 2 : 3)
    state_gradients_kernel(const MAMBA2_GRID_CONSTANT GradientParams params) {
  auto& shared = *static_cast<GradientShared<T, kN>*>(ptx::dynamic_smem());
  const Place at = Place::of<kN>(params);
  if (threadIdx.x == 0) shared.segment = Segment::of<kN, first_pass>(params);
  __syncthreads();
  if (first_pass) {
    if (threadIdx.x < 32) skip_forgotten(shared.segment, params, at);
    __syncthreads();
  }
  const Segment& segment = shared.segment;
  const int first = segment.first, count = segment.count;

  Gradient G;
  if (const float* from = segment.from) {
    G.for_pairs(params, at, [&](int64_t i, float* pair) {
      const float2 v = *reinterpret_cast<const float2*>(from + i);
      pair[0] = v.x, pair[1] = v.y;
    });
  }
  uint4 S[kTiles];
  if (count > 0) {
    if (!first_pass) load_S<T>(S, params.scan.S, params, at, first + count - 1);
    start_chunk<T, kN>(shared.stage[0], params, at, first + count - 1);
    store_weight(shared.stage[0], load_weight(params, at, first + count - 1));
  }
  for (int i = 0; i < count; ++i) {
    auto& stage = shared.stage[i & 1];
    auto& other = shared.stage[~i & 1];
    const int i_chunk = first + count - 1 - i;
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this stage is full, the other one no longer read
    if (i > 0 && !first_pass) store_K<kN>(other, params, at, i_chunk + 1);
    Weight next;
    if (i + 1 < count) {
      start_chunk<T, kN>(other, params, at, i_chunk - 1);
      next = load_weight(params, at, i_chunk - 1);
    }
    if (!first_pass) {
      store_state<T>(G, S, i_chunk == first ? segment.S_unrounded : nullptr, stage, params, at,
                     i_chunk);
      if (i + 1 < count) load_S<T>(S, params.scan.S, params, at, i_chunk - 1);
    }
    advance<T>(G, stage, at);
    if (i + 1 < count) store_weight(other, next);
  }
  __syncthreads();
  if (count > 0 && !first_pass) store_K<kN>(shared.stage[~count & 1], params, at, first);
  if (float* to = segment.to) {
    G.for_pairs(params, at, [&](int64_t i, float* pair) {
      *reinterpret_cast<float2*>(to + i) = float2{pair[0], pair[1]};
    });
  }
}

template <class T, int kN, bool first_pass>
int run(const GradientParams& params, int64_t sweeps, void* stream) {
  const int64_t slices = ceil_div(params.p, kP) * ceil_div(params.n, kN);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(sweeps * slices * params.h));
  at.threads = 2 * kN;
  at.smem_bytes = sizeof(GradientShared<T, kN>);
  at.tile = {q, kP, kN, 2};
  return launch(state_gradients_kernel<T, kN, first_pass>, at, stream, params);
}
template <class T, bool first_pass>
int run(const GradientParams& params, int64_t sequences, int sm_count, void* stream) {
  const int64_t sweeps = sequences * params.segments.count;
  const int64_t wide = sweeps * params.h * ceil_div(params.p, kP) * ceil_div(params.n, 128);
  return params.n > 64 && wide >= 2 * sm_count ? run<T, 128, first_pass>(params, sweeps, stream)
                                               : run<T, 64, first_pass>(params, sweeps, stream);
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
                              shape.n, problem.a_cumsum_log2,   problem.segments};
  const auto sweep = [&](auto first_pass) {
    constexpr bool kFirstPass = decltype(first_pass)::value;
    return problem.dtype == DType::bf16
               ? run<bf16, kFirstPass>(params, shape.nseq, problem.sm_count, stream)
               : run<f16, kFirstPass>(params, shape.nseq, problem.sm_count, stream);
  };
  if (problem.segments.cut()) {
    if (int error = sweep(std::true_type{})) return error;
    if (int error = segment_passing(shape, problem.chunking, problem.segments,
                                    problem.a_cumsum_log2, true, stream))
      return error;
  }
  return sweep(std::false_type{});
}

}  // namespace mamba2::ssd::sm80
