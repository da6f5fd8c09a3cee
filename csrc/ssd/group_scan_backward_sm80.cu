// group_scan_backward: dB and dC, sums over the heads of a group:
//   dC_i = sum over heads of 2^s_i S^T dy_i                 + sum_{j<=i} dCB_ij B_j
//   dB_j = sum over heads of delta_j 2^(s_q-s_j) G^T x_j    + sum_{i>=j} dCB_ij C_i
//   E_i  = C_i . (2^s_i S^T dy_i)                             head by head, on the way to dC
// dCB comes summed over the heads of a split from chunk_scan_backward.
//
// grid: (chunk, group, split of its heads, slice of n, dB or dC, 64 tokens), the last fastest: they
// share S or G in L2. A block keeps (64 tokens, kN) of dB or dC in registers and runs over its
// heads; a head is the product (64, p) (p, kN), weighted by row in fp32 when it is added. The dCB
// products are further turns of the same loop: 64 x 64 of dCB in the place of x or dy, rows of B or
// C in the place of the state. 4 warps, 2 x 2, each (32, kN / 2). Several splits: fp32 partial
// sums, which group_scan_sum adds in their order. Shared memory at p 64, n 128: 66 KB (two stages):
// 3 blocks an SM. Bound by HBM (x, dy, S, G read).
#include "../core/launch.h"
#include "tiles_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int kThreads = 128, kRows = 64;  // tokens of a block

struct GroupParams {
  GroupScanBackward scan;
  Chunking chunking;
  int chunks, h, p, g, n, splits;
  const float* delta;          // (chunks, h, q)
  const float* a_cumsum_log2;  // (chunks, h, q)
};

struct Place {
  int i_chunk, i_g, i_split, n0, part, first_token, first_head, heads;
  bool is_dC;
  MAMBA2_DEVICE void find(const GroupParams& params, int slice) {
    int i = blockIdx.x;
    const auto next = [&](int count) {
      const int at = i % count;
      i /= count;
      return at;
    };
    first_token = kRows * next(params.chunking.q / kRows);
    is_dC = next(2) != 0;
    part = next(ceil_div(params.n, slice));
    i_split = next(params.splits);
    i_g = next(params.g);
    i_chunk = i;
    n0 = part * slice;
    const int in_group = params.h / params.g, in_split = ceil_div(in_group, params.splits);
    const int left = in_group - i_split * in_split;
    first_head = i_g * in_group + i_split * in_split;
    heads = left < in_split ? left : in_split;
  }
};

template <class T, int kP, int kN>
struct GroupShared {
  struct Stage {
    tile::SharedTile<T, kRows, 64> u[kP / 64];   // (tokens, p) of dy or x; or dCB
    tile::SharedTile<T, kP, 64> state[kN / 64];  // (p, n) of S or G; or rows of B or C
    float s[kRows], delta[kRows], last[4];       // last[3] is s_q
  };
  Stage stage[2];
  tile::SharedTile<T, kRows, 64> C[kN / 64];  // of this block's tokens, for E
  // What the block works on lies here, for the accumulators leave no registers for it.
  Place place;
  Chunk chunk;
  float dot[2][2][kRows];  // E of a head, by half of the columns
};

// ---- loads ----
template <class T, int kP, int kN, class Stage>
MAMBA2_DEVICE void start_head(Stage& stage, const GroupParams& params, const Place& at,
                              const Chunk& chunk, int i_h) {
  const GroupScanBackward& scan = params.scan;
  const Strided& u = at.is_dC ? scan.dy : scan.x;
  const int64_t head = int64_t(at.i_chunk) * params.h + i_h;
  const T* states = static_cast<const T*>(at.is_dC ? scan.S : scan.G);
  const Panels<T, kRows> to_u{stage.u};
  const Panels<T, kP> to_state{stage.state};
  to_u.template copy_async<kThreads>(kP / 64, rows_of<T>(u, chunk, i_h) + at.first_token * u.l, u.l,
                                     chunk.count - at.first_token, params.p);
  to_state.template copy_async<kThreads>(kN / 64, states + head * params.p * params.n + at.n0,
                                         params.n, params.p, params.n - at.n0);
  const int i = threadIdx.x % 64 * 4, q = params.chunking.q;
  const bool second = threadIdx.x >= 64;
  const float* from = (second ? params.delta : params.a_cumsum_log2) + head * q;
  if (i < kRows) {
    ptx::cp_async_16((second ? stage.delta : stage.s) + i, from + at.first_token + i, true);
  } else if (i == kRows && !second) {
    ptx::cp_async_16(stage.last, from + q - 4, true);
  }
}

// The 64 x 64 tokens of dCB^T, [j][i], that this block's tokens make with tokens `other`, and the
// rows of B (for dC) or C at those tokens.
template <class T, int kP, int kN, class Stage>
MAMBA2_DEVICE void start_dCB(Stage& stage, const GroupParams& params, const Place& at,
                             const Chunk& chunk, int other) {
  const GroupScanBackward& scan = params.scan;
  const Strided& v = at.is_dC ? scan.B : scan.C;
  const int q = params.chunking.q;
  const int j = at.is_dC ? other : at.first_token, i = at.is_dC ? at.first_token : other;
  const int64_t split = (int64_t(at.i_chunk) * params.g + at.i_g) * params.splits + at.i_split;
  const T* dCB = static_cast<const T*>(scan.dCB) + split * q * q + j * q + i;
  const Panels<T, kRows> to_u{stage.u};
  const Panels<T, kP> to_rows{stage.state};
  to_u.template copy_async<kThreads>(1, dCB, q, 64, 64);
  to_rows.template copy_async<kThreads>(kN / 64, rows_of<T>(v, chunk, at.i_g) + other * v.l + at.n0,
                                        v.l, chunk.count - other, params.n - at.n0);
}

// ---- products ----
// A warp's (32, 32 kGroups) of dB or dC.
template <int kGroups>
struct Gradient {
  float value[kGroups][2][4][4];  // 32 columns, 16 rows, 8 columns, element
};

// fresh (32, 32) = u (32, depth) w (depth, 32); u is [token][depth], or [depth][token] transposed.
template <class T, bool kTransposed, class U, class W>
MAMBA2_DEVICE void product(float (&fresh)[2][4][4], const U& u, const W& w, int m, int n,
                           int depth) {
  MAMBA2_NO_UNROLL for (int k = 0; k < depth; k += 16) {
    uint32_t a[2][4], b[4];
    MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
      if (kTransposed) {
        tile::load_a_transposed(a[i], u, k, m + 16 * i);
      } else {
        tile::load_a(a[i], u, m + 16 * i, k);
      }
    }
    MAMBA2_UNROLL for (int c = 0; c < 2; ++c) {
      tile::load_b_transposed(b, w, k, n + 16 * c);
      MAMBA2_UNROLL for (int i = 0; i < 2; ++i)
          tile::mma_16x16<T>(fresh[i][2 * c], fresh[i][2 * c + 1], a[i], b);
    }
  }
}

// The warp's place in the block's tile.
struct WarpTile {
  int m, n, half;
  template <int kN>
  static MAMBA2_DEVICE WarpTile of() {
    const int warp = threadIdx.x / 32;
    return {warp / 2 * 32, warp % 2 * (kN / 2), warp % 2};
  }
  // Token of this lane's rows: fragment i, half r of it.
  MAMBA2_DEVICE int row(int i, int r) const { return m + 16 * i + 8 * r + tile::fragment_row(); }
};

// E += C_i . fresh_i over 32 columns.
template <class T, class Tile>
MAMBA2_DEVICE void add_E(float (&E)[2][2], const float (&fresh)[2][4][4], const Tile& C, int m,
                         int n) {
  MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
    MAMBA2_UNROLL for (int t = 0; t < 4; t += 2) {
      uint32_t c[4];  // as an A fragment: the layout of two accumulators
      tile::load_a(c, C, m + 16 * i, n + 8 * t);
      MAMBA2_UNROLL for (int k = 0; k < 4; ++k) {
        const int r = k & 1;
        const float2 v = unpack2<T>(c[k]);
        const float (&f)[4] = fresh[i][t + k / 2];
        E[i][r] += v.x * f[2 * r] + v.y * f[2 * r + 1];
      }
    }
  }
}

// Adds a head; for dC leaves this warp's share of E in `dot`.
template <class T, bool kIsdC, int kP, int kN, int kGroups, class Stage>
MAMBA2_DEVICE void add_head(Gradient<kGroups>& sum, Stage& stage, float (&dot)[kRows],
                            GroupShared<T, kP, kN>& shared, const WarpTile& at, int p) {
  const Panels<T, kRows> u{stage.u}, C{shared.C};
  const Panels<T, kP> w{stage.state};
  float weight[2][2], E[2][2] = {};
  MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
    MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
      const float s = stage.s[at.row(i, r)];
      weight[i][r] = kIsdC ? ptx::ex2(s) : ptx::ex2(stage.last[3] - s) * stage.delta[at.row(i, r)];
    }
  }
  MAMBA2_UNROLL for (int c = 0; c < kGroups; ++c) {
    float fresh[2][4][4] = {};
    product<T, false>(fresh, u, w, at.m, at.n + 32 * c, p);
    MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
      MAMBA2_UNROLL for (int t = 0; t < 4; ++t) {
        MAMBA2_UNROLL for (int e = 0; e < 4; ++e) sum.value[c][i][t][e] +=
            weight[i][e >> 1] * fresh[i][t][e];
      }
    }
    if constexpr (kIsdC) add_E<T>(E, fresh, C, at.m, at.n + 32 * c);
  }
  if constexpr (kIsdC) {
    MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
      MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
        const float e = quad_sum(weight[i][r] * E[i][r]);
        if (tile::lane() % 4 == 0) dot[at.row(i, r)] = e;
      }
    }
  }
}

// Adds 64 tokens of dCB times as many rows of B or C.
template <class T, bool kIsdC, int kP, int kGroups, class Stage>
MAMBA2_DEVICE void add_dCB(Gradient<kGroups>& sum, Stage& stage, const WarpTile& at) {
  const Panels<T, kRows> u{stage.u};
  const Panels<T, kP> w{stage.state};
  MAMBA2_UNROLL for (int c = 0; c < kGroups; ++c)
      product<T, kIsdC>(sum.value[c], u, w, at.m, at.n + 32 * c, 64);
}

// ---- results ----
MAMBA2_DEVICE void store_E(const float (&dot)[2][kRows], const GroupParams& params, const Place& at,
                           int i_h) {
  const int row = threadIdx.x;
  if (row >= kRows) return;
  const int64_t head = (int64_t(at.part) * params.chunks + at.i_chunk) * params.h + i_h;
  params.scan.from_state[head * params.chunking.q + at.first_token + row] =
      dot[0][row] + dot[1][row];
}

// The finished sum of this split: the result itself, or one of the partial sums.
template <class T, int kGroups>
MAMBA2_DEVICE void store_sum(const Gradient<kGroups>& sum, const GroupParams& params,
                             const Place& at, const Chunk& chunk, const WarpTile& warp) {
  const StridedOut& out = at.is_dC ? params.scan.dC : params.scan.dB;
  const int64_t q = params.chunking.q, width = int64_t(params.g) * params.n;
  const int64_t tile_at = (int64_t(at.is_dC) * params.splits + at.i_split) * params.chunks;
  float* partial = params.scan.partial + (tile_at + at.i_chunk) * q * width + at.i_g * params.n;
  T* result = static_cast<T*>(out.ptr) + chunk.row * out.b + chunk.token * out.l + at.i_g * out.h;
  MAMBA2_UNROLL for (int c = 0; c < kGroups; ++c) {
    MAMBA2_UNROLL for (int i = 0; i < 2; ++i) {
      MAMBA2_UNROLL for (int t = 0; t < 4; t += 2) {
        const auto& left = sum.value[c][i][t];
        const auto& right = sum.value[c][i][t + 1];
        const int column = at.n0 + warp.n + 32 * c + 8 * t;
        if (params.splits == 1) {
          const uint4 unit = tile::to_unit<T>(left, right);
          const int token = at.first_token + warp.m + 16 * i + tile::unit_row();
          if (token < chunk.count && column + tile::unit_col() < params.n)
            *reinterpret_cast<uint4*>(result + token * out.l + column + tile::unit_col()) = unit;
          continue;
        }
        if (column >= params.n) continue;
        MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
          float* to =
              partial + (at.first_token + warp.row(i, r)) * width + column + tile::fragment_col();
          *reinterpret_cast<float2*>(to) = float2{left[2 * r], left[2 * r + 1]};
          *reinterpret_cast<float2*>(to + 8) = float2{right[2 * r], right[2 * r + 1]};
        }
      }
    }
  }
}

template <class T, int kP, int kN, bool kIsdC>
MAMBA2_DEVICE void run_block(const GroupParams& params, GroupShared<T, kP, kN>& shared) {
  constexpr int kGroups = kN / 64;
  const Place& at = shared.place;
  const Chunk& chunk = shared.chunk;
  const WarpTile warp = WarpTile::of<kN>();
  // After the heads, dCB: tokens up to this block's own for dC, from them on for dB.
  const int first_other = kIsdC ? 0 : at.first_token;
  const int others = kIsdC ? at.first_token / 64 + 1 : (params.chunking.q - at.first_token) / 64;
  const int turns = at.heads + others;
  const auto start = [&](int turn) {
    auto& stage = shared.stage[turn & 1];
    if (turn < at.heads) {
      start_head<T, kP, kN>(stage, params, at, chunk, at.first_head + turn);
    } else if (turn < turns) {
      start_dCB<T, kP, kN>(stage, params, at, chunk, first_other + 64 * (turn - at.heads));
    }
    ptx::cp_async_commit_group();
  };

  Gradient<kGroups> sum{};
  if constexpr (kIsdC) {
    const Strided& C = params.scan.C;
    const T* from = rows_of<T>(C, chunk, at.i_g) + at.first_token * C.l + at.n0;
    Panels<T, kRows>{shared.C}.template copy_async<kThreads>(
        kN / 64, from, C.l, chunk.count - at.first_token, params.n - at.n0);
  }
  start(0);
  MAMBA2_NO_UNROLL for (int turn = 0; turn < turns; ++turn) {
    auto& stage = shared.stage[turn & 1];
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this stage is full, the other one no longer read
    start(turn + 1);
    if (kIsdC && turn > 0 && turn <= at.heads)
      store_E(shared.dot[~turn & 1], params, at, at.first_head + turn - 1);
    if (turn < at.heads) {
      add_head<T, kIsdC>(sum, stage, shared.dot[turn & 1][warp.half], shared, warp, params.p);
    } else {
      add_dCB<T, kIsdC, kP>(sum, stage, warp);
    }
  }
  store_sum<T>(sum, params, at, chunk, warp);
}

template <class T, int kP, int kN>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kN == 64   ? 4
                                               : kP == 64 ? 3
                                                          : 2)
    group_scan_backward_kernel(const MAMBA2_GRID_CONSTANT GroupParams params) {
  auto& shared = *static_cast<GroupShared<T, kP, kN>*>(ptx::dynamic_smem());
  if (threadIdx.x == 0) {
    shared.place.find(params, kN);
    shared.chunk = params.chunking.at(shared.place.i_chunk);
  }
  __syncthreads();
  if (shared.chunk.i_seq < 0) return;
  if (shared.place.is_dC) {
    run_block<T, kP, kN, true>(params, shared);
  } else {
    run_block<T, kP, kN, false>(params, shared);
  }
}

// grid: (chunk, 16 tokens, dB or dC): the splits' partial sums, added in their order and rounded.
constexpr int kSumTokens = 16;
template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(256, 2)
    group_scan_sum_kernel(const MAMBA2_GRID_CONSTANT GroupParams params) {
  const int i_chunk = blockIdx.x, first = blockIdx.y * kSumTokens;
  const bool is_dC = blockIdx.z != 0;
  const Chunk chunk = params.chunking.at(i_chunk);
  if (chunk.i_seq < 0) return;
  const StridedOut& out = is_dC ? params.scan.dC : params.scan.dB;
  const int64_t q = params.chunking.q, width = int64_t(params.g) * params.n;
  const int64_t stride = int64_t(params.chunks) * q * width;
  const float* partial = params.scan.partial + is_dC * params.splits * stride + i_chunk * q * width;
  T* result = static_cast<T*>(out.ptr) + chunk.row * out.b + chunk.token * out.l;
  const int last = first + kSumTokens < chunk.count ? first + kSumTokens : chunk.count;
  for (int64_t i = first * width + threadIdx.x * 4; i < last * width; i += 256 * 4) {
    float4 sum{0, 0, 0, 0};
    for (int s = 0; s < params.splits; ++s) {
      const float4 v = *reinterpret_cast<const float4*>(partial + s * stride + i);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    const int64_t token = i / width, column = i % width;
    T* to = result + token * out.l + column / params.n * out.h + column % params.n;
    *reinterpret_cast<uint2*>(to) = uint2{pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w)};
  }
}

template <class T, int kP, int kN>
int run(const GroupParams& params, void* stream) {
  const int64_t blocks = int64_t(params.chunks) * params.g * params.splits *
                         ceil_div(params.n, kN) * 2 * (params.chunking.q / kRows);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(blocks));
  at.threads = kThreads;
  at.smem_bytes = sizeof(GroupShared<T, kP, kN>);
  at.tile = {kRows, kP, kN, 2};
  return launch(group_scan_backward_kernel<T, kP, kN>, at, stream, params);
}
template <class T>
int run(const GroupParams& params, void* stream) {
  int error = 0;
  if (params.p <= 64) {
    error = params.n <= 64 ? run<T, 64, 64>(params, stream) : run<T, 64, 128>(params, stream);
  } else {
    error = params.n <= 64 ? run<T, 128, 64>(params, stream) : run<T, 128, 128>(params, stream);
  }
  if (error || params.splits == 1) return error;
  const LaunchShape at{dim3(params.chunks, params.chunking.q / kSumTokens, 2), 256, 0};
  return launch(group_scan_sum_kernel<T>, at, stream, params);
}

}  // namespace

int group_scan_parts(const Shape& shape) { return ceil_div(shape.n, shape.n <= 64 ? 64 : 128); }

int group_scan_backward(const BackwardProblem& problem, const GroupScanBackward& scan,
                        void* stream) {
  const Range range("group_scan_backward");
  const Shape& shape = problem.shape;
  const GroupParams params{
      scan,    problem.chunking, problem.chunks, shape.h,       shape.p,
      shape.g, shape.n,          problem.splits, problem.delta, problem.a_cumsum_log2};
  return problem.dtype == DType::bf16 ? run<bf16>(params, stream) : run<f16>(params, stream);
}

}  // namespace mamba2::ssd::sm80
