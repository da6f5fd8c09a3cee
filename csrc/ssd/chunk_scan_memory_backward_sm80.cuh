// How a block of chunk_scan_backward_sm80.cu lies in shared memory, its loads, and C B^T.
#pragma once
#include "tiles_backward_sm80.cuh"

namespace mamba2::ssd::sm80 {

constexpr int kBlock = 16;  // tokens of a block: one fragment
constexpr int kBlocks = q / kBlock, kBlockPairs = kBlocks * (kBlocks + 1) / 2;
constexpr int kThreads = 32 * kBlocks;

struct ScanParams {
  ChunkScanBackward scan;
  Chunking chunking;
  int chunks, h, p, g, n, splits, stages;
  const float* delta;          // (chunks, h, q)
  const float* a_cumsum_log2;  // (chunks, h, q)
  const float* a_rest_log2;    // (chunks, h, q)
};

// The block's place in the grid.
struct Place {
  int i_chunk, i_g, i_split, first_head, end_head;
  MAMBA2_DEVICE explicit Place(const ScanParams& params) {
    i_split = blockIdx.x % params.splits;
    i_g = blockIdx.x / params.splits % params.g;
    i_chunk = blockIdx.x / params.splits / params.g;
    const int heads = params.h / params.g, split = ceil_div(heads, params.splits);
    first_head = i_g * heads + i_split * split;
    const int end = first_head + split, end_of_group = (i_g + 1) * heads;
    end_head = end < end_of_group ? end : end_of_group;
  }
};

// How a block lies in shared memory (the .cu file says when).
template <class Element, bool resident, bool wide>
struct Layout {
  using T = Element;
  static constexpr bool kResident = resident, kWide = wide;
  static constexpr int kP = wide ? 128 : 64, kPanelsP = kP / 64;
};
template <class T>
using Resident = Layout<T, true, false>;
template <class T>
using Streamed = Layout<T, false, false>;
template <class T>
using Wide = Layout<T, false, true>;

// What a head brings.
template <class Kind>
struct Stage {
  using T = typename Kind::T;
  Panels<T, q> x, dy;  // (q, p)
  float* s;            // (q) cumulative log2 decay
  float* rest;         // (q) what s lacks by being fp32
  float* delta;        // (q)
  Panels<T, 64> G;     // (p, n), when resident

  static constexpr int kTileBytes = Panels<T, q>::bytes(Kind::kPanelsP);
  static MAMBA2_HD int bytes(int panels_n) {
    return 2 * kTileBytes + 12 * q + (Kind::kResident ? Panels<T, 64>::bytes(panels_n) : 0);
  }
  MAMBA2_DEVICE explicit Stage(char* base) {
    x.panel = reinterpret_cast<typename Panels<T, q>::Panel*>(base);
    dy.panel = x.panel + Kind::kPanelsP;
    s = reinterpret_cast<float*>(dy.panel + Kind::kPanelsP);
    rest = s + q;
    delta = rest + q;
    G.panel = reinterpret_cast<typename Panels<T, 64>::Panel*>(delta + q);
  }
};

template <class Kind>
struct Shared {
  using T = typename Kind::T;
  // A value a token, or a channel and warp.
  struct Small {
    float R[kBlockPairs * kBlock];  // of block j at token i >= 16 j
    float Q[q];
    float dD[kBlocks][Kind::kP];
  };
  int panels_n;
  Panels<T, q> B;   // (q, n), or 64 columns of it
  Panels<T, 64> G;  // 64 x 64 of G, when streamed
  float4* CB;       // pairs of 16 x 8 tokens, 32 lanes each: (C B^T)_ij, j down
  Small* small;
  char* stages;

  static MAMBA2_HD int panels_of_B(int panels_n) { return Kind::kResident ? panels_n : 1; }
  static int bytes(const ScanParams& params) {
    const int panels_n = ceil_div(params.n, 64);
    return params.stages * Stage<Kind>::bytes(panels_n) +
           Panels<T, q>::bytes(panels_of_B(panels_n)) +
           (Kind::kResident ? 0 : Panels<T, 64>::bytes(1)) + kBlockPairs * 1024 +
           int(sizeof(Small));
  }
  MAMBA2_DEVICE Shared(void* smem, const ScanParams& params) : panels_n(ceil_div(params.n, 64)) {
    B.panel = static_cast<typename Panels<T, q>::Panel*>(smem);
    G.panel = reinterpret_cast<typename Panels<T, 64>::Panel*>(B.panel + panels_of_B(panels_n));
    CB = reinterpret_cast<float4*>(G.panel + (Kind::kResident ? 0 : 1));
    small = reinterpret_cast<Small*>(CB + kBlockPairs * 64);
    stages = reinterpret_cast<char*>(small + 1);
  }
  MAMBA2_DEVICE Stage<Kind> stage(int i) const {
    return Stage<Kind>(stages + i * Stage<Kind>::bytes(panels_n));
  }
  // This lane's eight elements of C B^T in block (i, j).
  MAMBA2_DEVICE float4* CB_at(int block_i, int block_j) const {
    return CB + (block_i * (block_i + 1) / 2 + block_j) * 64 + tile::lane();
  }
  // Block j's share of R_i.
  MAMBA2_DEVICE float& R_at(int block_j, int i) const {
    return small->R[(block_j * kBlocks - block_j * (block_j - 1) / 2 - block_j) * kBlock + i];
  }
};

// ---- loads ----
// Columns of B and of another tensor or matrix that belong together: panel i of each.
template <class Kind>
MAMBA2_DEVICE void start_B(const Shared<Kind>& shared, const ScanParams& params, const Place& at,
                           const Chunk& chunk, int i) {
  using T = typename Kind::T;
  const Strided& B = params.scan.B;
  const Panels<T, q> to{shared.B.panel + (Kind::kResident ? i : 0)};
  to.template copy_async<kThreads>(1, rows_of<T>(B, chunk, at.i_g) + 64 * i, B.l, chunk.count,
                                   params.n - 64 * i);
}
// Rows p0 on of G of a head: columns 64 first_panel on.
template <class T>
MAMBA2_DEVICE void start_G(const Panels<T, 64>& to, const ScanParams& params, const Place& at,
                           int i_h, int p0, int first_panel, int panels) {
  const int64_t head = int64_t(at.i_chunk) * params.h + i_h;
  const T* G = static_cast<const T*>(params.scan.G) + (head * params.p + p0) * params.n;
  to.template copy_async<kThreads>(panels, G + 64 * first_panel, params.n, params.p - p0,
                                   params.n - 64 * first_panel);
}

// The i-th head of the block, to its stage; a group of copies even where there is no such head.
template <class Kind>
MAMBA2_DEVICE void start_head(const Shared<Kind>& shared, const ScanParams& params, const Place& at,
                              const Chunk& chunk, int i) {
  using T = typename Kind::T;
  const ChunkScanBackward& scan = params.scan;
  const int i_h = at.first_head + i;
  if (i_h < at.end_head) {
    const auto stage = shared.stage(i % params.stages);
    stage.x.template copy_async<kThreads>(Kind::kPanelsP, rows_of<T>(scan.x, chunk, i_h), scan.x.l,
                                          chunk.count, params.p);
    stage.dy.template copy_async<kThreads>(Kind::kPanelsP, rows_of<T>(scan.dy, chunk, i_h),
                                           scan.dy.l, chunk.count, params.p);
    const int which = threadIdx.x * 4 / q, t = threadIdx.x * 4 % q;  // of three arrays
    if (which < 3) {
      const float* from = which == 0   ? params.a_cumsum_log2
                          : which == 1 ? params.a_rest_log2
                                       : params.delta;
      const int64_t head = int64_t(at.i_chunk) * params.h + i_h;
      ptx::cp_async_16(stage.s + which * q + t, from + head * q + t, true);
    }
    if (Kind::kResident) start_G(stage.G, params, at, i_h, 0, 0, shared.panels_n);
  }
  ptx::cp_async_commit_group();
}

// ---- C B^T ----
// 64 columns of C at a time lie where x of the first head will.
template <class Kind>
MAMBA2_DEVICE void compute_CB(const Shared<Kind>& shared, const ScanParams& params, const Place& at,
                              const Chunk& chunk, int block_j) {
  using T = typename Kind::T;
  const Strided& C = params.scan.C;
  const Panels<T, q> to_C{shared.stage(0).x.panel};
  float CB[kBlocks][2][4] = {};
  for (int i = 0; i < shared.panels_n; ++i) {
    start_B(shared, params, at, chunk, i);
    to_C.template copy_async<kThreads>(1, rows_of<T>(C, chunk, at.i_g) + 64 * i, C.l, chunk.count,
                                       params.n - 64 * i);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    const auto& B = shared.B.panel[Kind::kResident ? i : 0];
    for (int k = 0; k < 64 && 64 * i + k < params.n; k += 16) {
      uint32_t a[4], b[4];
      tile::load_a(a, B, kBlock * block_j, k);
      MAMBA2_UNROLL for (int block = 0; block < kBlocks; ++block) {
        if (block_j + block >= kBlocks) break;
        tile::load_b(b, *to_C.panel, kBlock * (block_j + block), k);
        tile::mma_16x16<T>(CB[block][0], CB[block][1], a, b);
      }
    }
    __syncthreads();
  }
  MAMBA2_UNROLL for (int block = 0; block < kBlocks; ++block) {
    if (block_j + block >= kBlocks) break;
    float4* to = shared.CB_at(block_j + block, block_j);
    MAMBA2_UNROLL for (int t = 0; t < 2; ++t) {
      const float (&v)[4] = CB[block][t];
      to[32 * t] = float4{v[0], v[1], v[2], v[3]};
    }
  }
}

}  // namespace mamba2::ssd::sm80
