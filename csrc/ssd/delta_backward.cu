// delta_backward: the gradients of delta_t and of delta_t A, from their parts, to d_dt, dA and
// d_dt_bias (equations in delta_backward.h).
//
// delta_gradients: grid (chunks, blocks of 16 heads), 8 tokens a lane, so that both sums along the
//   chunk are scans of the q / 8 lanes of a head. The result goes through shared memory, because dt
//   and d_dt are read and written heads first, two heads a thread; dt is on its way from the start.
// sum_chunks: grid (blocks of 32 columns, array): what the chunks left, added in a fixed order, in
//   fp64: chunks are many, and the sum of their roundings would be most of the error of dD.
// Bound by HBM: up to five fp32 arrays (tokens, h) read once, dt read, d_dt written.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "delta_backward.h"
#include "head_tile.cuh"

namespace mamba2::ssd {
namespace {

struct Gradients {
  DeltaGradientParts parts;
  Chunking chunking;
  int chunks, h;
  bool single;  // one part of everything
  StepInputs steps;
  bool paired;               // dt and d_dt of two heads are a word each
  bool clamped;              // dt_min or dt_max can act
  const float* d_log_decay;  // (nseq, h)
  StridedOut d_dt;           // (b, l, h)
  float* dA;                 // (chunks, h)
  float* d_dt_bias;          // (chunks, h)
};

constexpr int kLaneTokens = 8;  // consecutive ones
template <int q>
using Tile = HeadTile<q, kLaneTokens>;

// A block: a head's lanes, all threads, and how far apart a thread's tokens are heads first.
template <int q>
struct Block {
  static constexpr int kLanes = q / kLaneTokens, kThreads = kTileHeads * kLanes;
  static constexpr int kWarps = kThreads / 32, kApart = kThreads / kTilePairs;
  static constexpr int kSteps = q / kApart;
};

template <int q>
struct Smem {
  Tile<q> d_delta;
  float2 d_dt_bias[Block<q>::kWarps][kTilePairs];
};

constexpr unsigned kAllLanes = 0xffffffffu;

// r[k] becomes the sum over this lane's elements from k on and all of the later lanes'.
template <int kLanes>
MAMBA2_DEVICE void suffix_sum(float (&r)[kLaneTokens], int lane) {
  MAMBA2_UNROLL
  for (int k = kLaneTokens - 2; k >= 0; --k) r[k] += r[k + 1];
  float later = __shfl_down_sync(kAllLanes, r[0], 1, kLanes);
  if (lane == kLanes - 1) later = 0;
  MAMBA2_UNROLL
  for (int step = 1; step < kLanes; step *= 2) {
    const float v = __shfl_down_sync(kAllLanes, later, step, kLanes);
    if (lane + step < kLanes) later += v;
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) r[k] += later;
}
// r[k] becomes the sum over this lane's elements before k and all of the earlier lanes'.
template <int kLanes>
MAMBA2_DEVICE void prefix_sum(float (&r)[kLaneTokens], int lane) {
  float sum = 0;
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) {
    const float v = r[k];
    r[k] = sum;
    sum += v;
  }
  float earlier = __shfl_up_sync(kAllLanes, sum, 1, kLanes);
  if (lane == 0) earlier = 0;
  earlier = inclusive_sum<kLanes>(earlier, lane);
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) r[k] += earlier;
}
MAMBA2_DEVICE void add_run(float (&sum)[kLaneTokens], const float* from) {
  float v[kLaneTokens];
  load_run(v, from);
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) sum[k] += v[k];
}

// What the parts of a head say of this lane's tokens, added up.
template <int q>
struct HeadParts {
  float delta[kLaneTokens], across[kLaneTokens], to_state[kLaneTokens], d_delta[kLaneTokens];
  float through;

  // `part` is the number of the first one, `all` of how many in an array. Of a single part nothing
  // stands between the loads: they are on their way at once.
  MAMBA2_DEVICE HeadParts(const DeltaGradientParts& parts, bool single, int head, int part, int all,
                          int first) {
    const int64_t at = int64_t(part) * q + first;
    const bool has_from_state = first >= parts.from_state_first;
    float from_state[kLaneTokens] = {};
    load_run(delta, parts.delta + int64_t(head) * q + first);
    load_run(across, parts.rows + at);
    load_run(to_state, parts.to_state + at);
    load_run(d_delta, parts.columns + at);
    const int64_t there = int64_t(part) * parts.from_state_apart + first - parts.from_state_first;
    if (has_from_state) load_run(from_state, parts.from_state + there);
    through = parts.through[part];
    MAMBA2_UNROLL
    for (int k = 0; k < kLaneTokens; ++k) across[k] += from_state[k];
    if (single) return;
    MAMBA2_NO_UNROLL
    for (int i = 1; i < parts.through_parts; ++i) through += parts.through[int64_t(i) * all + part];
    MAMBA2_NO_UNROLL
    for (int i = 1; i < parts.from_state_parts; ++i)
      add_run(across, parts.from_state + int64_t(i) * all * parts.from_state_apart + there);
    MAMBA2_NO_UNROLL
    for (int i = 1; i < parts.passes * parts.head_parts; ++i) {
      const int64_t more = i % parts.head_parts + i / parts.head_parts * all;
      const int64_t next = (part + more) * q + first;
      through += parts.through[part + more];
      add_run(across, parts.rows + next);
      if (has_from_state) add_run(across, parts.from_state + more * parts.from_state_apart + there);
      add_run(to_state, parts.to_state + next);
      add_run(d_delta, parts.columns + next);
    }
  }
  // An array may hold anything beyond a chunk's count.
  MAMBA2_DEVICE void clear_from(int count, int first) {
    MAMBA2_UNROLL
    for (int k = 0; k < kLaneTokens; ++k)
      if (first + k >= count) delta[k] = across[k] = to_state[k] = 0;
  }
};

// A head of the chunk: d delta into shared memory, the chunk's share of dA to global memory. Lanes
// of a head that does not exist do what those of the last one do.
template <int q>
MAMBA2_DEVICE void head_gradients(Tile<q>& s_d_delta, const Gradients& g, const Chunk& chunk,
                                  int i_c, int first_head) {
  constexpr int kLanes = Block<q>::kLanes;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, first = lane * kLaneTokens;
  const bool exists = first_head + row < g.h;
  const int i_h = exists ? first_head + row : g.h - 1;
  // Heads of all arrays are so few that 32 bits count them.
  const int head = i_c * g.h + i_h, all = g.chunks * g.h * g.parts.head_parts;
  const uint32_t A_bits = load_bits_of(g.steps.A, i_h);
  // log_decay of a segment is the plain sum: the clamp of a token's decay is not in its gradient.
  const float d_log_decay = g.d_log_decay ? g.d_log_decay[int64_t(chunk.i_seq) * g.h + i_h] : 0.f;
  HeadParts<q> of(g.parts, g.single, head, head * g.parts.head_parts, all, first);
  if (chunk.count < q) of.clear_from(chunk.count, first);
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) {
    of.d_delta[k] += of.to_state[k];
    of.to_state[k] *= of.delta[k];
  }
  suffix_sum<kLanes>(of.across, lane);
  prefix_sum<kLanes>(of.to_state, lane);

  const float A = float_of_bits(g.steps.A.dtype, A_bits);
  float dA = 0;
  MAMBA2_UNROLL
  for (int k = 0; k < kLaneTokens; ++k) {
    const float sum = of.across[k] + of.to_state[k] + of.through;
    const float d_a = (decay_clamped(of.delta[k], A) ? 0.f : sum) + d_log_decay;
    dA += of.delta[k] * d_a;
    of.d_delta[k] += A * d_a;
  }
  store_row(&s_d_delta.at(row, first), of.d_delta);
  MAMBA2_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) dA += __shfl_xor_sync(kAllLanes, dA, step);
  if (lane == 0 && exists) g.dA[head] = dA;
}

// d delta / d dt of v = dt + dt_bias: 0 where delta is clamped.
template <int kSteps>
MAMBA2_DEVICE void slopes_of(const Gradients& g, const float2 (&v)[kSteps], float2 (&r)[kSteps]) {
  const StepInputs& in = g.steps;
  const auto slope = [&](float v) { return in.dt_softplus ? fast::softplus_slope(v) : 1.f; };
  const auto clamped = [&](float v) {
    const float raw = in.dt_softplus ? fast::softplus(v) : v;
    return raw < in.dt_min || raw > in.dt_max;
  };
  MAMBA2_UNROLL
  for (int k = 0; k < kSteps; ++k) r[k] = float2{slope(v[k].x), slope(v[k].y)};
  if (!g.clamped) return;
  MAMBA2_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if (clamped(v[k].x)) r[k].x = 0;
    if (clamped(v[k].y)) r[k].y = 0;
  }
}

// d_dt of a pair of heads.
template <int q, class Pair>
MAMBA2_DEVICE void store_pairs(const Gradients& g, const Chunk& chunk, const Pair& pair,
                               const float2 (&d_dt)[Block<q>::kSteps]) {
  constexpr int kSteps = Block<q>::kSteps, kApart = Block<q>::kApart;
  const DType dtype = g.steps.dt_dtype;
  int64_t at = pair.offset(g.d_dt, chunk);
  if (g.paired) {
    uint16_t* to = static_cast<uint16_t*>(g.d_dt.ptr) + at;
    MAMBA2_UNROLL
    for (int k = 0; k < kSteps; ++k, to += kApart * g.d_dt.l) {
      const uint32_t word = dtype == DType::bf16 ? pack2<bf16>(d_dt[k].x, d_dt[k].y)
                                                 : pack2<f16>(d_dt[k].x, d_dt[k].y);
      if (pair.has_token(k)) *reinterpret_cast<uint32_t*>(to) = word;
    }
    return;
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kSteps; ++k, at += kApart * g.d_dt.l) {
    if (!pair.has_token(k)) continue;
    store(g.d_dt.ptr, dtype, at, d_dt[k].x);
    if (pair.has_second) store(g.d_dt.ptr, dtype, at + g.d_dt.h, d_dt[k].y);
  }
}

// Stores d_dt of a pair of heads. Returns the sum over the warp's tokens, in the lanes of its
// first.
template <int q, class Pair>
MAMBA2_DEVICE float2 store_d_dt(const Gradients& g, const Chunk& chunk, const Pair& pair,
                                const Tile<q>& s_d_delta) {
  constexpr int kSteps = Block<q>::kSteps;
  float2 v[kSteps], d_dt[kSteps], sum{};
  pair.biased(g.steps, g.paired, chunk, v);
  slopes_of(g, v, d_dt);
  MAMBA2_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    const int t = pair.token(k);
    d_dt[k].x *= s_d_delta.at(pair.head, t);
    d_dt[k].y *= s_d_delta.at(pair.head + 1, t);
    sum.x += pair.has_token(k) ? d_dt[k].x : 0.f;
    sum.y += pair.has_token(k) ? d_dt[k].y : 0.f;
  }
  store_pairs<q>(g, chunk, pair, d_dt);
  MAMBA2_UNROLL
  for (int step = 16; step >= kTilePairs; step /= 2) {
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, step);
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, step);
  }
  return sum;
}

template <int q>
__global__ void MAMBA2_LAUNCH_BOUNDS(Block<q>::kThreads, q > 128 ? 1 : 3)
    delta_gradients_kernel(const MAMBA2_GRID_CONSTANT Gradients g) {
  Smem<q>& smem = *static_cast<Smem<q>*>(ptx::dynamic_smem());
  const int i_c = blockIdx.x, first_head = blockIdx.y * kTileHeads;
  const bool is_head = int(threadIdx.x) < kTileHeads && first_head + int(threadIdx.x) < g.h;
  const int64_t head = int64_t(i_c) * g.h + first_head + threadIdx.x;  // where is_head
  const Chunk chunk = g.chunking.at(i_c);
  // In this order: all that came before this kernel is complete when the next one begins.
  const auto wait = [] { ptx::griddepcontrol_wait(), ptx::griddepcontrol_launch_dependents(); };
  if (chunk.i_seq < 0) {  // asked before dt, or that would be waited for with it
    wait();
    if (is_head) g.dA[head] = g.d_dt_bias[head] = 0;
    return;
  }
  const PairOfHeads<Block<q>::kSteps, Block<q>::kApart> pair(g.steps, g.paired, chunk, first_head,
                                                             g.h);
  wait();
  head_gradients<q>(smem.d_delta, g, chunk, i_c, first_head);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float2 bias_sum = store_d_dt<q>(g, chunk, pair, smem.d_delta);
  if (lane < kTilePairs) smem.d_dt_bias[warp][lane] = bias_sum;
  __syncthreads();
  if (!is_head) return;
  float sum = 0;
  MAMBA2_UNROLL
  for (int w = 0; w < Block<q>::kWarps; ++w)
    sum += reinterpret_cast<const float*>(smem.d_dt_bias[w])[threadIdx.x];
  g.d_dt_bias[head] = sum;
}

// ---- sums over chunks ----
constexpr int kSums = 3, kSumWarps = 32, kLoadsAtOnce = 8;
struct ChunkSums {
  const float* parts[kSums];  // (chunks, width)
  float* sum[kSums];          // (width)
  int width[kSums];
  int64_t chunks;
};
struct SumSmem {
  double partial[kSumWarps][32 + 1];
};

__global__ void MAMBA2_LAUNCH_BOUNDS(32 * kSumWarps, 1)
    sum_chunks_kernel(const MAMBA2_GRID_CONSTANT ChunkSums s) {
  ptx::griddepcontrol_wait();
  SumSmem& smem = *static_cast<SumSmem*>(ptx::dynamic_smem());
  const int which = blockIdx.y, width = s.width[which];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.x * 32 + lane;
  double sum = 0;
  for (int64_t first = warp; first < s.chunks; first += kSumWarps * kLoadsAtOnce) {
    float part[kLoadsAtOnce];
    MAMBA2_UNROLL
    for (int k = 0; k < kLoadsAtOnce; ++k) {
      const int64_t i = first + k * kSumWarps;
      part[k] = i < s.chunks && column < width ? s.parts[which][i * width + column] : 0.f;
    }
    MAMBA2_UNROLL
    for (int k = 0; k < kLoadsAtOnce; ++k) sum += part[k];
  }
  smem.partial[warp][lane] = sum;
  __syncthreads();
  // A warp a column.
  sum = smem.partial[lane][warp];
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0 && int(blockIdx.x) * 32 + warp < width)
    s.sum[which][blockIdx.x * 32 + warp] = static_cast<float>(sum);
}

template <int q>
int launch_gradients(const Gradients& g, void* stream) {
  const LaunchShape at{dim3(g.chunks, ceil_div(g.h, kTileHeads)), Block<q>::kThreads,
                       sizeof(Smem<q>), g.parts.programmatic};
  return launch(delta_gradients_kernel<q>, at, stream, g);
}

}  // namespace

std::size_t delta_backward_workspace_bytes(int64_t chunks, int h) {
  return 2 * sizeof(float) * chunks * h;
}

int delta_gradients(const BackwardParams& p, const DeltaGradientParts& parts,
                    const Chunking& chunking, int64_t chunks, void* workspace, void* stream) {
  const Range range("delta_gradients");
  const Inputs& in = p.in;
  Gradients g{};
  g.parts = parts;
  g.chunking = chunking;
  g.chunks = static_cast<int>(chunks);
  g.h = in.shape.h;
  g.single = parts.through_parts * parts.from_state_parts * parts.head_parts * parts.passes == 1;
  g.steps = step_inputs(in);
  g.paired = heads_pair_up(in.dt, in.dt_dtype, g.h) && heads_pair_up(p.d_dt, in.dt_dtype, g.h);
  // softplus is never below 0.
  g.clamped = g.steps.dt_min > (in.dt_softplus ? 0 : -INFINITY) || g.steps.dt_max < INFINITY;
  g.d_log_decay = static_cast<const float*>(p.d_log_decay);
  g.d_dt = p.d_dt;
  g.dA = static_cast<float*>(workspace);
  g.d_dt_bias = g.dA + chunks * g.h;
  switch (chunking.q) {
    case 32:
      return launch_gradients<32>(g, stream);
    case 64:
      return launch_gradients<64>(g, stream);
    case 128:
      return launch_gradients<128>(g, stream);
    default:
      return launch_gradients<256>(g, stream);
  }
}

int sum_chunks(const BackwardParams& p, const DeltaGradientParts& parts, int64_t chunks,
               const void* workspace, void* stream) {
  const Range range("sum_chunks");
  ChunkSums s{};
  s.chunks = chunks;
  int count = 0, widest = 0;
  const auto add = [&](const float* from, void* to, int width) {
    if (!to || !from) return;
    s.parts[count] = from;
    s.sum[count] = static_cast<float*>(to);
    s.width[count++] = width;
    if (width > widest) widest = width;
  };
  const int h = p.in.shape.h;
  const float* dA = static_cast<const float*>(workspace);
  add(dA, p.dA, h);
  add(dA + chunks * h, p.d_dt_bias, h);
  add(parts.dD, p.dD, parts.dD_width);
  const LaunchShape at{dim3(ceil_div(widest, 32), count), 32 * kSumWarps, sizeof(SumSmem),
                       parts.programmatic};
  return launch(sum_chunks_kernel, at, stream, s);
}

}  // namespace mamba2::ssd
