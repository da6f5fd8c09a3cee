// chunk_state and state_passing in one sweep over the chunks of a sequence:
//   S_next = 2^s_q S + sum_j x~_j B_j^T,   x~_j = 2^(s_q - s_j) delta_j x_j
// writes the state ENTERING each chunk, rounded to the dtype for chunk_scan, and the final state in
// fp32. The sum is taken over 64 tokens, half a chunk, at a time (q is their last): weights just
// below 1 all round one way, and the more so the more tokens they span. S stays in fp32
// accumulators from the first token to the last, so that no chunk's own state is ever rounded or
// stored: at b 8, l 4096, h 80, p 64, n 128 the sweep moves 0.67 GB (x read, states written) where
// separate kernels move 1.3 GB with 16-bit states and 2.3 GB with fp32 ones.
//
// Long sequences that would leave SMs idle are cut into segments and swept twice: the first time
// for what each segment adds to the state, fp32, and nothing else; the first chunks of a segment
// whose later ones forget all that was before are left out of that.
//
// grid: (sequence, segment, head, tile of p, tile of n), n fastest, so that the blocks that read
// the same x run together; a block walks its segment in steps of 64 tokens. Warps split p (16 rows
// each); x~ is formed in registers, on the A operand. Shared memory at 64 x 128: a ring of 3 steps
// of x (8 KB) and B (16 KB), and two chunks' weights: 73 KB, three blocks an SM. Bound by HBM where
// b h is large; by the latency of a step where it is small, which is when narrower n tiles double
// the blocks. fp16: states, like all operands, must stay below 65504; bf16 has no such limit.
#include "../core/launch.h"
#include "../tile/sm80.cuh"
#include "segments_sm80.cuh"

namespace mamba2::ssd::sm80 {
namespace {

constexpr int q = kChunkTokens, kStepTokens = 64, kStages = 3;
constexpr int kStepsPerChunk = q / kStepTokens;

struct ChunkStateParams {
  Strided x, B;                // (b, l, h, p), (b, l, g, n)   T
  const float* delta;          // (chunks, h, q)
  const float* a_cumsum_log2;  // (chunks, h, q)
  AnyFloat initial_states;     // (nseq, h, p, n), optional
  void* states;                // (chunks, h, p, n)            T, out; not in the first pass
  float* final_states;         // (nseq, h, p, n)              out, optional
  Chunking chunking;
  int h, p, n, heads_per_group;
  Segments segments;
  bool first_pass;
  void* state_rests;  // (chunks, h, p, n)            T, out, optional: second words of states
};

// What a block works on. It lies in shared memory, for the accumulators leave no registers for it.
struct Work {
  Sequence sequence;  // the segment's part of it
  int i_h, p_base, n_base;
  int first, chunks;  // of the segment
  AnyFloat entering;  // optional, (.., h, p, n): the state before the segment, and after it
  float* leaving;
  int i_entering, i_leaving;
};

// A (kTileP, kTileN) tile of the state: each warp has 16 rows and kTileN / kWarpsN columns.
template <class Element, int tile_p, int tile_n>
struct StateTile {
  using T = Element;
  static constexpr int kTileP = tile_p, kTileN = tile_n;
  static constexpr int kWarpsP = tile_p / 16, kWarpsN = kWarpsP < 4 ? 4 / kWarpsP : 1;
  static constexpr int kThreads = 32 * kWarpsP * kWarpsN;
  static constexpr int kBlocks = kTileN / kWarpsN / 16;  // (16, 16) blocks of a warp
  static_assert(kThreads >= q, "a thread per token of a chunk forms the weights");

  struct Shared {
    tile::SharedTile<T, kStepTokens, kTileP> x[kStages];
    tile::SharedTile<T, kStepTokens, kTileN> B[kStages];
    float weight[2][q];              // x~_j / x_j of this chunk and the next
    float decay[2][kStepsPerChunk];  // of a step
    Work work;
  };
};

template <class Tile>
struct Sweep {
  using T = typename Tile::T;
  const ChunkStateParams& params;
  typename Tile::Shared& shared;
  const Work& work;
  float acc[Tile::kBlocks][2][4];

  MAMBA2_DEVICE int warp_p() const { return threadIdx.x / 32 % Tile::kWarpsP * 16; }
  MAMBA2_DEVICE int warp_n() const {
    return threadIdx.x / 32 / Tile::kWarpsP * (Tile::kTileN / Tile::kWarpsN);
  }
  // Offset of the (p, n) matrix of chunk or sequence i, from this tile's corner on.
  MAMBA2_DEVICE int64_t matrix(int64_t i) const {
    return ((i * params.h + work.i_h) * params.p + work.p_base) * params.n + work.n_base;
  }

  MAMBA2_DEVICE void load_step(int step) {
    const int64_t left = work.sequence.length - static_cast<int64_t>(step) * kStepTokens;
    if (left > 0) {
      const int count = static_cast<int>(left < kStepTokens ? left : kStepTokens);
      const int64_t token = work.sequence.token + static_cast<int64_t>(step) * kStepTokens;
      const int i_g = work.i_h / params.heads_per_group, stage = step % kStages;
      const T* g_x = static_cast<const T*>(params.x.ptr) + work.sequence.row * params.x.b +
                     token * params.x.l + work.i_h * params.x.h + work.p_base;
      const T* g_B = static_cast<const T*>(params.B.ptr) + work.sequence.row * params.B.b +
                     token * params.B.l + i_g * params.B.h + work.n_base;
      tile::copy_async<Tile::kThreads>(shared.x[stage], g_x, params.x.l, count,
                                       params.p - work.p_base);
      tile::copy_async<Tile::kThreads>(shared.B[stage], g_B, params.B.l, count,
                                       params.n - work.n_base);
    }
    ptx::cp_async_commit_group();
  }

  // Token threadIdx.x of a chunk: delta, and s there, at the end of its step and of the one before.
  struct Weight {
    float delta = 0.f, s_j = 0.f, s_end = 0.f, s_before = 0.f;
  };
  MAMBA2_DEVICE Weight load_weight(int64_t i_chunk) const {
    const int j = threadIdx.x % q, step = j / kStepTokens * kStepTokens;
    const float* s = params.a_cumsum_log2 + (i_chunk * params.h + work.i_h) * q;
    const float* delta = params.delta + (i_chunk * params.h + work.i_h) * q;
    return {delta[j], s[j], s[step + kStepTokens - 1], step > 0 ? s[step - 1] : 0.f};
  }
  MAMBA2_DEVICE void store_weight(int i_c, const Weight& w) {
    const int j = threadIdx.x;
    if (j >= q) return;
    shared.weight[i_c % 2][j] = ptx::ex2(w.s_end - w.s_j) * w.delta;
    if (j % kStepTokens == 0)
      shared.decay[i_c % 2][j / kStepTokens] = ptx::ex2(w.s_end - w.s_before);
  }

  // f(row, column, two accumulators of columns column, column + 1) for all this lane owns.
  template <class F>
  MAMBA2_DEVICE void for_each_pair(F f) {
    MAMBA2_UNROLL for (int i = 0; i < 2 * Tile::kBlocks; ++i) {
      MAMBA2_UNROLL for (int half = 0; half < 2; ++half) {
        const int row = warp_p() + tile::fragment_row() + 8 * half;
        const int col = warp_n() + 8 * i + tile::fragment_col();
        if (work.p_base + row < params.p && work.n_base + col < params.n) {
          f(static_cast<int64_t>(row) * params.n + col, acc[i / 2][i % 2][2 * half],
            acc[i / 2][i % 2][2 * half + 1]);
        }
      }
    }
  }
  MAMBA2_DEVICE void load_state() {
    MAMBA2_UNROLL for (auto& block : acc) {
      MAMBA2_UNROLL for (int i = 0; i < 8; ++i) block[i / 4][i % 4] = 0.f;
    }
    const void* g_initial = work.entering.ptr;
    if (g_initial == nullptr) return;
    const bool is_fp32 = work.entering.dtype == DType::f32;  // T otherwise
    const int64_t at = matrix(work.i_entering);
    for_each_pair([&](int64_t i, float& left, float& right) {
      const float2 v =
          is_fp32 ? *reinterpret_cast<const float2*>(static_cast<const float*>(g_initial) + at + i)
                  : unpack2<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(g_initial) +
                                                                  at + i));
      left = v.x, right = v.y;
    });
  }
  MAMBA2_DEVICE void store_state() {
    if (work.leaving == nullptr) return;
    float* g_final = work.leaving + matrix(work.i_leaving);
    for_each_pair([&](int64_t i, float& left, float& right) {
      *reinterpret_cast<float2*>(g_final + i) = float2{left, right};
    });
  }
  MAMBA2_DEVICE void store_entering_state(int i_c) {
    const int64_t i_chunk = work.first + i_c;
    store_units(static_cast<T*>(params.states) + matrix(i_chunk), tile::to_unit<T>);
    const float* decay = shared.decay[i_c % 2];
    if (params.state_rests && lets_stay(decay[0] * decay[1]))
      store_units(static_cast<T*>(params.state_rests) + matrix(i_chunk), tile::to_rest_unit<T>);
  }
  template <class F>
  MAMBA2_DEVICE void store_units(T* to, F to_unit) {
    const int row = warp_p() + tile::unit_row();
    MAMBA2_UNROLL for (int i = 0; i < Tile::kBlocks; ++i) {
      const int col = warp_n() + 16 * i + tile::unit_col();
      const uint4 unit = to_unit(acc[i][0], acc[i][1]);
      if (work.p_base + row < params.p && work.n_base + col < params.n) {
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(row) * params.n + col) = unit;
      }
    }
  }

  MAMBA2_DEVICE void scale(float decay) {
    MAMBA2_UNROLL for (auto& block : acc) {
      MAMBA2_UNROLL for (int i = 0; i < 8; ++i) block[i / 4][i % 4] *= decay;
    }
  }
  // S += X~^T B over the tokens of one step. X~ is formed for several blocks of 16 tokens at once,
  // as many as registers allow, so that their latencies overlap.
  MAMBA2_DEVICE void accumulate(int stage, const float* weight) {
    constexpr int kAtOnce = Tile::kBlocks > 4 ? 2 : 4;
    MAMBA2_UNROLL for (int first = 0; first < kStepTokens; first += 16 * kAtOnce) {
      uint32_t a[kAtOnce][4], b[4];
      MAMBA2_UNROLL for (int t = 0; t < kAtOnce; ++t) {
        tile::load_a_transposed(a[t], shared.x[stage], first + 16 * t, warp_p());
      }
      MAMBA2_UNROLL for (int t = 0; t < kAtOnce; ++t) {
        tile::scale_columns<T>(a[t], weight + first + 16 * t);
      }
      MAMBA2_UNROLL for (int t = 0; t < kAtOnce; ++t) {
        MAMBA2_UNROLL for (int i = 0; i < Tile::kBlocks; ++i) {
          tile::load_b_transposed(b, shared.B[stage], first + 16 * t, warp_n() + 16 * i);
          tile::mma_16x16<T>(acc[i][0], acc[i][1], a[t], b);
        }
      }
    }
  }
};

// Segment k of a sequence: its tokens, where its state comes from and goes to. A segment that has
// nothing to do has no chunks and no state to leave.
MAMBA2_DEVICE void find_segment(Work& work, const ChunkStateParams& params, int i_seq, int k) {
  const Segments& segments = params.segments;
  const int all = params.chunking.count(i_seq), count = segments.of(all);
  const int begin = k * segments.chunks, slot = i_seq * segments.count + k;
  const bool is_last = k == count - 1;
  work.sequence = params.chunking.sequence(i_seq);
  work.first = params.chunking.first(i_seq) + begin;
  work.chunks = is_last ? all - begin : segments.chunks;
  work.sequence.token += int64_t(begin) * q;
  work.sequence.length -= int64_t(begin) * q;
  if (!is_last) work.sequence.length = int64_t(segments.chunks) * q;
  work.entering = params.initial_states, work.i_entering = i_seq;
  work.leaving = params.segments.carry, work.i_leaving = slot;
  if (k > 0) work.entering = {params.first_pass ? nullptr : segments.carry, DType::f32};
  if (k > 0) work.i_entering = slot - 1;
  if (!params.first_pass) {
    work.leaving = is_last ? params.final_states : nullptr, work.i_leaving = i_seq;
  }
  if (k >= count || (params.first_pass && is_last)) {
    work.chunks = 0, work.sequence.length = 0, work.leaving = nullptr;
  }
}

// First pass, by one warp: leaves out what the rest of the segment forgets.
MAMBA2_DEVICE void skip_forgotten(Work& work, const ChunkStateParams& params) {
  const int skipped = work.chunks - remembered_chunks(params.a_cumsum_log2, work.first, work.chunks,
                                                      params.h, work.i_h, false);
  __syncwarp();
  if (skipped == 0 || threadIdx.x > 0) return;
  work.first += skipped, work.chunks -= skipped;
  work.sequence.token += int64_t(skipped) * q, work.sequence.length -= int64_t(skipped) * q;
  work.entering.ptr = nullptr;
}

template <class Tile>
MAMBA2_DEVICE Work find_work(const ChunkStateParams& params) {
  const int n_tiles = ceil_div(params.n, Tile::kTileN), p_tiles = ceil_div(params.p, Tile::kTileP);
  Work work;
  int i = static_cast<int>(blockIdx.x);
  work.n_base = i % n_tiles * Tile::kTileN, i /= n_tiles;
  work.p_base = i % p_tiles * Tile::kTileP, i /= p_tiles;
  work.i_h = i % params.h, i /= params.h;
  find_segment(work, params, i / params.segments.count, i % params.segments.count);
  return work;
}

template <class Tile>
__global__ void MAMBA2_LAUNCH_BOUNDS(Tile::kThreads, Tile::kThreads > 128 ? 2 : 3)
    chunk_state_kernel(MAMBA2_GRID_CONSTANT const ChunkStateParams params) {
  auto& shared = *static_cast<typename Tile::Shared*>(ptx::dynamic_smem());
  const Work& work = shared.work;
  ptx::griddepcontrol_launch_dependents();
  if (params.chunking.table) ptx::griddepcontrol_wait();
  if (threadIdx.x == 0) shared.work = find_work<Tile>(params);
  __syncthreads();
  if (params.first_pass) {
    ptx::griddepcontrol_wait();
    if (threadIdx.x < 32) skip_forgotten(shared.work, params);
    __syncthreads();
  }

  Sweep<Tile> sweep{params, shared, work};
  MAMBA2_UNROLL for (int step = 0; step < kStages - 1; ++step) sweep.load_step(step);
  ptx::griddepcontrol_wait();
  sweep.load_state();
  if (work.chunks > 0) sweep.store_weight(0, sweep.load_weight(work.first));

  for (int i_c = 0; i_c < work.chunks; ++i_c) {
    typename Sweep<Tile>::Weight next;
    if (i_c + 1 < work.chunks) next = sweep.load_weight(work.first + i_c + 1);
    MAMBA2_NO_UNROLL for (int half = 0; half < kStepsPerChunk; ++half) {
      const int step = i_c * kStepsPerChunk + half;
      if (static_cast<int64_t>(step) * kStepTokens >= work.sequence.length) break;
      ptx::cp_async_wait_group<kStages - 2>();
      __syncthreads();  // the step has landed, and the stage of the step before is free
      sweep.load_step(step + kStages - 1);
      if (half == 0 && !params.first_pass) sweep.store_entering_state(i_c);
      sweep.scale(shared.decay[i_c % 2][half]);
      sweep.accumulate(step % kStages, shared.weight[i_c % 2] + half * kStepTokens);
    }
    if (i_c + 1 < work.chunks) sweep.store_weight(i_c + 1, next);
  }
  sweep.store_state();
}

template <class T, int tile_p, int tile_n>
int run(const ChunkStateParams& params, int64_t nseq, const Device& device, void* stream) {
  using Tile = StateTile<T, tile_p, tile_n>;
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(nseq * params.segments.count * params.h *
                                       ceil_div(params.p, tile_p) * ceil_div(params.n, tile_n)));
  at.threads = Tile::kThreads;
  at.smem_bytes = sizeof(typename Tile::Shared);
  at.programmatic = device.major >= 9;
  at.tile = {kStepTokens, tile_p, tile_n, kStages};
  return launch(chunk_state_kernel<Tile>, at, stream, params);
}

template <class T, int tile_p>
int choose_tile_n(const ChunkStateParams& params, int64_t nseq, const Device& device,
                  void* stream) {
  // Two blocks an SM hide the latency of a step; below that, halve the tiles.
  const int64_t blocks = nseq * params.segments.count * params.h * ceil_div(params.p, tile_p) *
                         ceil_div(params.n, 128);
  return params.n > 64 && blocks >= 2 * device.sm_count
             ? run<T, tile_p, 128>(params, nseq, device, stream)
             : run<T, tile_p, 64>(params, nseq, device, stream);
}

template <class T>
int choose_tile_p(const ChunkStateParams& params, int64_t nseq, const Device& device,
                  void* stream) {
  switch (head_dim_tile(params.p, device)) {
    case 32:
      return choose_tile_n<T, 32>(params, nseq, device, stream);
    case 64:
      return choose_tile_n<T, 64>(params, nseq, device, stream);
    default:
      return choose_tile_n<T, 80>(params, nseq, device, stream);
  }
}

}  // namespace

int chunk_state(const Inputs& in, const Chunking& chunking, const float* delta,
                const float* a_cumsum_log2, void* states, float* final_states,
                const Segments& segments, const Device& device, void* stream, void* state_rests) {
  const Range range("chunk_state");
  const Shape& shape = in.shape;
  ChunkStateParams params{
      in.x,         in.B,     delta,      a_cumsum_log2, in.initial_states, states,
      final_states, chunking, shape.h,    shape.p,       shape.n,           shape.heads_per_group(),
      segments,     false,    state_rests};
  const auto sweep = [&](bool first_pass) {
    params.first_pass = first_pass;
    return in.dtype == DType::bf16 ? choose_tile_p<bf16>(params, shape.nseq, device, stream)
                                   : choose_tile_p<f16>(params, shape.nseq, device, stream);
  };
  if (segments.cut()) {
    if (int e = sweep(true)) return e;
    if (int e = segment_passing(shape, chunking, segments, a_cumsum_log2, false, stream)) return e;
  }
  return sweep(false);
}

}  // namespace mamba2::ssd::sm80
