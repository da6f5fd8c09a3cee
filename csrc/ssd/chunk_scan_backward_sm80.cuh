// The steps of chunk_scan_backward_sm80.cu, which states the equations and who owns what.
#pragma once
#include "chunk_scan_memory_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {

// ---- one head ----
// This lane's two tokens j of the warp's block.
struct Rows {
  int first;
  float s[2], rest[2], delta[2], to_end[2];
  template <class Stage>
  MAMBA2_DEVICE Rows(const Stage& stage, int block_j) : first(kBlock * block_j) {
    MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
      s[r] = stage.s[token(r)];
      rest[r] = stage.rest[token(r)];
      delta[r] = stage.delta[token(r)];
      to_end[r] = ptx::ex2(stage.s[q - 1] - s[r]);
    }
  }
  MAMBA2_DEVICE int token(int r) const { return first + tile::fragment_row() + 8 * r; }
};

// This lane's shares of the sums over columns, for its two tokens j.
struct Sums {
  float below[2] = {};     // sum_{i>j} V_ij
  float diagonal[2] = {};  // V_jj
  float state[2] = {};     // F_j / delta_j

  // Adds x_j.(2^(s_q-s_j) G B_j) over 64 channels.
  template <class Kind, class Tile>
  MAMBA2_DEVICE void to_state(const float (&GB)[8][4], const Tile& x, const Rows& rows, int p0) {
    MAMBA2_UNROLL for (int k = 0; k < 4; ++k) {
      uint32_t words[4];
      tile::load_a(words, x, rows.first, p0 + 16 * k);
      MAMBA2_UNROLL for (int i = 0; i < 4; ++i) {
        const float2 v = unpack2<typename Kind::T>(words[i]);
        const float* gb = GB[2 * k + i / 2] + 2 * (i & 1);
        state[i & 1] += v.x * gb[0] + v.y * gb[1];
      }
    }
  }
  template <class Shared>
  MAMBA2_DEVICE void store(const Shared& shared, const Rows& rows, const ScanParams& params,
                           int64_t head) const {
    MAMBA2_UNROLL for (int r = 0; r < 2; ++r) {
      const float b = quad_sum(below[r]), d = quad_sum(diagonal[r]), f = quad_sum(state[r]);
      if (tile::lane() % 4 != 0) continue;
      const int j = rows.token(r);
      shared.small->Q[j] = rows.delta[r] * b;
      params.scan.columns[head * q + j] = b + d;
      params.scan.to_state[head * q + j] = f;
    }
  }
};

// dx_j += (G B_j) over 64 columns: panels of B and G.
template <class T, class TileB, class TileG>
MAMBA2_DEVICE void multiply_states(float (&dx)[8][4], const TileB& B, const TileG& G,
                                   const Rows& rows, int columns) {
  MAMBA2_NO_UNROLL for (int k = 0; k < columns; k += 16) {
    uint32_t a[4], b[4];
    tile::load_a(a, B, rows.first, k);
    MAMBA2_UNROLL for (int i = 0; i < 4; ++i) {
      tile::load_b(b, G, 16 * i, k);
      tile::mma_16x16<T>(dx[2 * i], dx[2 * i + 1], a, b);
    }
  }
}

// dx_j = 2^(s_q-s_j) G B_j, for 64 channels from p0.
template <class Kind>
MAMBA2_DEVICE void from_states(float (&dx)[8][4], const Shared<Kind>& shared,
                               const Stage<Kind>& stage, const ScanParams& params, const Place& at,
                               const Chunk& chunk, const Rows& rows, int i_h, int p0) {
  using T = typename Kind::T;
  if (Kind::kResident) {
    multiply_states<T>(dx, shared.B, stage.G, rows, params.n);
  } else {
    for (int i = 0; i < shared.panels_n; ++i) {
      __syncthreads();  // nobody reads the last columns any more
      start_B(shared, params, at, chunk, i);
      start_G(shared.G, params, at, i_h, p0, i, 1);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      const int left = params.n - 64 * i;
      multiply_states<T>(dx, *shared.B.panel, *shared.G.panel, rows, left < 64 ? left : 64);
    }
  }
  MAMBA2_UNROLL for (int i = 0; i < 8; ++i) {
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) dx[i][e] *= rows.to_end[e >> 1];
  }
}

// v[t][c], this lane's share of column 8 t + fragment_col() + c, summed over the eight lanes that
// hold that column. Lanes with an even row return the sum of the column numbered *column.
MAMBA2_DEVICE float sum_columns(const float (&v)[2][2], int* column) {
  const bool right = tile::lane() & 16, odd = tile::lane() & 8;
  float half[2];
  MAMBA2_UNROLL for (int c = 0; c < 2; ++c) {
    const float give = right ? v[0][c] : v[1][c];
    half[c] = (right ? v[1][c] : v[0][c]) + __shfl_xor_sync(~0u, give, 16);
  }
  float sum = (odd ? half[1] : half[0]) + __shfl_xor_sync(~0u, odd ? half[0] : half[1], 8);
  sum += __shfl_xor_sync(~0u, sum, 4);
  *column = (right ? 8 : 0) + tile::fragment_col() + (odd ? 1 : 0);
  return sum;
}

// W = x_j.dy_i for the block's tokens, over all channels.
template <class Kind>
MAMBA2_DEVICE void scores(float (&W)[2][4], const Stage<Kind>& stage, const ScanParams& params,
                          int first_i, int first_j) {
  MAMBA2_UNROLL for (int k = 0; k < Kind::kP; k += 16) {
    if (k >= params.p) break;
    uint32_t a[4], b[4];
    tile::load_a(a, stage.x, first_j, k);
    tile::load_b(b, stage.dy, first_i, k);
    tile::mma_16x16<typename Kind::T>(W[0], W[1], a, b);
  }
}

// s_i - s_j for the block's tokens, from both words of s.
template <class Stage>
MAMBA2_DEVICE void log2_decays(float (&log2_L)[2][4], const Stage& stage, const Rows& rows,
                               int first_i) {
  MAMBA2_UNROLL for (int t = 0; t < 2; ++t) {
    const int column = first_i + 8 * t + tile::fragment_col();
    const float2 s_i = *reinterpret_cast<const float2*>(stage.s + column);
    const float2 rest_i = *reinterpret_cast<const float2*>(stage.rest + column);
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) {
      const int r = e >> 1;
      const float s = (e & 1 ? s_i.y : s_i.x) - rows.s[r];
      log2_L[t][e] = s + ((e & 1 ? rest_i.y : rest_i.x) - rows.rest[r]);
    }
  }
}

// The block of tokens i x j: its part of dx (64 channels from p0), and, once, of dCB and the sums.
template <class Kind>
MAMBA2_DEVICE void inside_block(float (&dx)[8][4], float (&dCB)[2][4], Sums& sums,
                                const Shared<Kind>& shared, const Stage<Kind>& stage,
                                const ScanParams& params, const Rows& rows, int block_i,
                                bool on_diagonal, int p0) {
  using T = typename Kind::T;
  const bool once = !Kind::kWide || p0 == 0;
  const int first_i = kBlock * block_i, block_j = rows.first / kBlock;
  float W[2][4] = {};
  if (once) scores(W, stage, params, first_i, rows.first);
  float log2_L[2][4];
  log2_decays(log2_L, stage, rows, first_i);
  float M[2][4];       // L_ij (C_i.B_j)
  float R[2][2] = {};  // this lane's share of R_i
  const float4* CB = shared.CB_at(block_i, block_j);
  MAMBA2_UNROLL for (int t = 0; t < 2; ++t) {
    const float4 cb4 = CB[32 * t];
    const float cb[4] = {cb4.x, cb4.y, cb4.z, cb4.w};
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) {
      const int r = e >> 1, c = e & 1;
      const int i = 8 * t + tile::fragment_col() + c, j = tile::fragment_row() + 8 * r;
      const float L = on_diagonal && i < j ? 0.f : ptx::ex2(log2_L[t][e]);
      M[t][e] = L * cb[e];
      if (!once) continue;
      const float V = M[t][e] * W[t][e];
      const float strict = on_diagonal && i == j ? 0.f : V;
      if (on_diagonal && i == j) sums.diagonal[r] += V;
      sums.below[r] += strict;
      R[t][c] += strict * rows.delta[r];
      dCB[t][e] += L * rows.delta[r] * W[t][e];
    }
  }
  if (once) {
    int column;
    const float sum = sum_columns(R, &column);
    if (!(tile::lane() & 4)) shared.R_at(block_j, first_i + column) = sum;
  }
  uint32_t a[4], b[4];
  tile::pack_a<T>(a, M[0], M[1]);
  MAMBA2_UNROLL for (int k = 0; k < 4; ++k) {
    if (p0 + 16 * k >= params.p) break;
    tile::load_b_transposed(b, stage.dy, first_i, p0 + 16 * k);
    tile::mma_16x16<T>(dx[2 * k], dx[2 * k + 1], a, b);
  }
}

// ---- results ----
// dx_j = delta_j dx_j + D dy_j for 64 channels from p0, and dD of these tokens: by channel, or
// their sum over the channels, into shared memory.
template <class Kind>
MAMBA2_DEVICE void add_skip(float (&dx)[8][4], const Shared<Kind>& shared, const Stage<Kind>& stage,
                            const ScanParams& params, const Rows& rows, int i_h, int i_warp,
                            int p0) {
  using T = typename Kind::T;
  const ChunkScanBackward& scan = params.scan;
  float* dD = shared.small->dD[i_warp];
  float D = scan.D_per_channel ? 0.f : load<float>(scan.D, i_h), all = 0;
  MAMBA2_UNROLL for (int k = 0; k < 4; ++k) {
    if (p0 + 16 * k >= params.p) break;
    uint32_t x[4], dy[4];
    tile::load_a(x, stage.x, rows.first, p0 + 16 * k);
    tile::load_a(dy, stage.dy, rows.first, p0 + 16 * k);
    float v[2][2] = {};
    MAMBA2_UNROLL for (int i = 0; i < 4; ++i) {
      const float2 x2 = unpack2<T>(x[i]), dy2 = unpack2<T>(dy[i]);
      v[i / 2][0] += x2.x * dy2.x;
      v[i / 2][1] += x2.y * dy2.y;
      const int channel = p0 + 16 * k + 8 * (i / 2) + tile::fragment_col();
      float* to = dx[2 * k + i / 2] + 2 * (i & 1);
      if (scan.D_per_channel) D = load<float>(scan.D, int64_t(i_h) * params.p + channel);
      to[0] += D * dy2.x;
      if (scan.D_per_channel) D = load<float>(scan.D, int64_t(i_h) * params.p + channel + 1);
      to[1] += D * dy2.y;
    }
    all += v[0][0] + v[0][1] + v[1][0] + v[1][1];
    if (!scan.D_per_channel) continue;
    int column;
    const float sum = sum_columns(v, &column);
    if (!(tile::lane() & 4)) dD[p0 + 16 * k + column] = sum;
  }
  if (scan.D_per_channel) return;
  all = warp_sum(all);
  if (tile::lane() == 0) dD[0] = p0 == 0 ? all : dD[0] + all;
}

template <class Kind>
MAMBA2_DEVICE void store_dx(float (&dx)[8][4], const Shared<Kind>& shared, const Stage<Kind>& stage,
                            const ScanParams& params, const Chunk& chunk, const Rows& rows, int i_h,
                            int i_warp, int p0) {
  using T = typename Kind::T;
  const StridedOut& out = params.scan.dx;
  MAMBA2_UNROLL for (int i = 0; i < 8; ++i) {
    MAMBA2_UNROLL for (int e = 0; e < 4; ++e) dx[i][e] *= rows.delta[e >> 1];
  }
  if (params.scan.D.ptr) add_skip(dx, shared, stage, params, rows, i_h, i_warp, p0);
  const int j = rows.first + tile::unit_row();
  T* to = static_cast<T*>(out.ptr) + int64_t(chunk.row) * out.b + int64_t(chunk.token + j) * out.l +
          int64_t(i_h) * out.h;
  MAMBA2_UNROLL for (int k = 0; k < 4; ++k) {
    const uint4 unit = tile::to_unit<T>(dx[2 * k], dx[2 * k + 1]);
    const int channel = p0 + 16 * k + tile::unit_col();
    if (j < chunk.count && channel < params.p) *reinterpret_cast<uint4*>(to + channel) = unit;
  }
}

// The sums over tokens that several warps share, in the order of the warps; all sums written.
template <class Kind>
MAMBA2_DEVICE void store_sums(const Shared<Kind>& shared, const ScanParams& params, const Place& at,
                              int i_h) {
  const ChunkScanBackward& scan = params.scan;
  const auto& small = *shared.small;
  const int t = threadIdx.x;
  const int64_t head = int64_t(at.i_chunk) * params.h + i_h;
  if (t < q) {
    float R = 0;
    for (int block_j = 0; block_j <= t / kBlock; ++block_j) R += shared.R_at(block_j, t);
    scan.rows[head * q + t] = R - small.Q[t];
    return;
  }
  const int channel = t - q, channels = scan.D_per_channel ? params.p : 1;
  if (!scan.dD || channel >= channels) return;
  float sum = 0;
  for (int w = 0; w < kBlocks; ++w) sum += small.dD[w][channel];
  scan.dD[head * channels + channel] = sum;
}

// dCB^T, rounded: [j][i], with zeros above the diagonal.
template <class T>
MAMBA2_DEVICE void store_dCB(const float (&dCB)[kBlocks][2][4], const ScanParams& params,
                             const Place& at, int block_j) {
  const int64_t split = (int64_t(at.i_chunk) * params.g + at.i_g) * params.splits + at.i_split;
  T* to = static_cast<T*>(params.scan.dCB) + split * q * q +
          (kBlock * block_j + tile::unit_row()) * q + tile::unit_col();
  for (int block_i = 0; block_i < block_j; ++block_i)
    *reinterpret_cast<uint4*>(to + kBlock * block_i) = uint4{0, 0, 0, 0};
  MAMBA2_UNROLL for (int k = 0; k < kBlocks; ++k) {
    if (block_j + k >= kBlocks) break;
    *reinterpret_cast<uint4*>(to + kBlock * (block_j + k)) = tile::to_unit<T>(dCB[k][0], dCB[k][1]);
  }
}

// A chunk that does not exist still counts in the sums over all chunks.
MAMBA2_DEVICE void skip_chunk(const ScanParams& params, const Place& at) {
  if (!params.scan.dD) return;
  const int channels = params.scan.D_per_channel ? params.p : 1;
  const int64_t first = int64_t(at.i_chunk) * params.h + at.first_head;
  const int count = (at.end_head - at.first_head) * channels;
  for (int i = threadIdx.x; i < count; i += kThreads) params.scan.dD[first * channels + i] = 0;
}

}  // namespace mamba2::ssd::sm80
