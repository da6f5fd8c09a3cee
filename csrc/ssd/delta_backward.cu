// delta_backward: the gradients of delta_t and of delta_t A, from their parts, to d_dt, dA and
// d_dt_bias (equations in delta_backward.h).
//
// delta_gradients: grid (chunks, blocks of 16 heads), a warp a head, its lanes consecutive runs of
//   tokens, so that both sums along the chunk are scans of a warp. The result goes through shared
//   memory, because dt and d_dt are read and written heads first; dt is on its way from the start.
// sum_chunks: grid (blocks of 32 columns, array): what the chunks left, added in a fixed order, in
//   fp64: chunks are many, and the sum of their roundings would be most of the error of dD.
// Bound by HBM: six fp32 arrays (tokens, h) read once, dt read, d_dt written.
#include <cstring>
#include <type_traits>

#include "../core/convert.cuh"
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "delta_backward.h"
#include "formulas.cuh"

namespace mamba2::ssd {
namespace {

constexpr int kHeads = 16, kWarps = 16, kThreads = 32 * kWarps;
constexpr int kTokensAtOnce = kThreads / kHeads;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Gradients {
  DeltaGradientParts parts;
  Chunking chunking;
  int64_t chunks;
  int h;
  Strided dt;  // (b, l, h)
  DType dt_dtype;
  AnyFloat A, dt_bias;  // (h)
  bool dt_softplus;
  float dt_min, dt_max;
  const float* d_log_decay;  // (nseq, h)
  StridedOut d_dt;           // (b, l, h)
  float* dA;                 // (chunks, h)
  float* d_dt_bias;          // (chunks, h)
};

template <int kTokens>
struct Smem {
  float d_delta[kTokens][kHeads + 1];
  float d_dt_bias[kTokensAtOnce][kHeads];
};

// r[k] becomes the sum over this lane's elements from k on and all of the later lanes'.
template <int kRun>
MAMBA2_DEVICE void suffix_sum(float (&r)[kRun], int lane) {
  MAMBA2_UNROLL
  for (int k = kRun - 2; k >= 0; --k) r[k] += r[k + 1];
  float later = __shfl_down_sync(kAllLanes, r[0], 1);
  if (lane == 31) later = 0;
  MAMBA2_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const float v = __shfl_down_sync(kAllLanes, later, step);
    if (lane + step < 32) later += v;
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) r[k] += later;
}
// r[k] becomes the sum over this lane's elements before k and all of the earlier lanes'.
template <int kRun>
MAMBA2_DEVICE void prefix_sum(float (&r)[kRun], int lane) {
  float sum = 0;
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) {
    const float v = r[k];
    r[k] = sum;
    sum += v;
  }
  float earlier = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane == 0) earlier = 0;
  MAMBA2_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const float v = __shfl_up_sync(kAllLanes, earlier, step);
    if (lane >= step) earlier += v;
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) r[k] += earlier;
}
MAMBA2_DEVICE float warp_sum(float v) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// This lane's run of consecutive elements.
template <int kRun>
MAMBA2_DEVICE void load_run(float (&r)[kRun], const float* from) {
  using Vector =
      std::conditional_t<(kRun > 2), float4, std::conditional_t<kRun == 2, float2, float>>;
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; k += kWidth) {
    const Vector v = *reinterpret_cast<const Vector*>(from + k);
    std::memcpy(r + k, &v, sizeof v);
  }
}

template <int kRun>
MAMBA2_DEVICE void add_run(float (&sum)[kRun], const float* from) {
  float v[kRun];
  load_run(v, from);
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) sum[k] += v[k];
}

// One head of the chunk: d delta into shared memory, the chunk's share of dA to global memory.
template <int kRun>
MAMBA2_DEVICE void head_gradients(Smem<32 * kRun>& smem, const Gradients& g, const Chunk& chunk,
                                  int i_c, int i_h, int lane) {
  const DeltaGradientParts& parts = g.parts;
  constexpr int kTokens = 32 * kRun;
  const int first = lane * kRun;
  // Heads of all arrays are so few that 32 bits count them.
  const int head = i_c * g.h + i_h, part = head * parts.head_parts;
  const int all = static_cast<int>(g.chunks) * g.h * parts.head_parts;
  const int64_t at = int64_t(part) * kTokens + first;
  const float A = load<float>(g.A, i_h);
  // log_decay of a segment is the plain sum: the clamp of a token's decay is not in its gradient.
  const float d_log_decay = g.d_log_decay ? g.d_log_decay[int64_t(chunk.i_seq) * g.h + i_h] : 0.f;
  float through = 0;
  for (int i = 0; i < parts.through_parts; ++i) through += parts.through[int64_t(i) * all + part];

  float delta[kRun], across[kRun], to_state[kRun], d_delta[kRun];
  load_run(delta, parts.delta + int64_t(head) * kTokens + first);
  load_run(across, parts.rows + at);
  load_run(to_state, parts.to_state + at);
  load_run(d_delta, parts.columns + at);
  for (int i = 0; i < parts.from_state_parts; ++i)
    add_run(across, parts.from_state + int64_t(i) * all * kTokens + at);
  MAMBA2_NO_UNROLL
  for (int i = 1; i < parts.passes * parts.head_parts; ++i) {
    const int64_t more = i % parts.head_parts + i / parts.head_parts * all;
    const int64_t next = (part + more) * kTokens + lane * kRun;
    through += parts.through[part + more];
    add_run(across, parts.rows + next);
    add_run(across, parts.from_state + next);
    add_run(to_state, parts.to_state + next);
    add_run(d_delta, parts.columns + next);
  }
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) {
    if (first + k >= chunk.count) delta[k] = across[k] = to_state[k] = 0;
    d_delta[k] += to_state[k];
    to_state[k] *= delta[k];
  }
  suffix_sum(across, lane);
  prefix_sum(to_state, lane);

  float dA = 0;
  MAMBA2_UNROLL
  for (int k = 0; k < kRun; ++k) {
    const float d_decay = decay_clamped(delta[k], A) ? 0.f : across[k] + to_state[k] + through;
    const float d_a = d_decay + d_log_decay;
    dA += delta[k] * d_a;
    smem.d_delta[first + k][i_h % kHeads] = d_delta[k] + A * d_a;
  }
  dA = warp_sum(dA);
  if (lane == 0) g.dA[int64_t(i_c) * g.h + i_h] = dA;
}

// dt of one head, every kTokensAtOnce-th token from `at` on; 0 past the chunk's end.
template <class Stored, int kSteps>
MAMBA2_DEVICE void load_dt(float (&raw)[kSteps], const Gradients& g, int64_t at, int tokens) {
  MAMBA2_UNROLL
  for (int k = 0; k < kSteps; ++k, at += kTokensAtOnce * g.dt.l)
    raw[k] =
        k * kTokensAtOnce < tokens ? convert<float>(static_cast<const Stored*>(g.dt.ptr)[at]) : 0.f;
}
template <int kSteps>
MAMBA2_DEVICE void load_dt(float (&raw)[kSteps], const Gradients& g, int64_t at, int tokens) {
  switch (g.dt_dtype) {
    case DType::f64:
      return load_dt<double>(raw, g, at, tokens);
    case DType::f32:
      return load_dt<float>(raw, g, at, tokens);
    case DType::bf16:
      return load_dt<bf16>(raw, g, at, tokens);
    case DType::f16:
      return load_dt<f16>(raw, g, at, tokens);
  }
}

template <int kRun>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kRun > 4 ? 1 : 2)
    delta_gradients(const MAMBA2_GRID_CONSTANT Gradients g) {
  ptx::griddepcontrol_launch_dependents();
  if (!g.parts.complete_early) ptx::griddepcontrol_wait();
  Smem<32 * kRun>& smem = *static_cast<Smem<32 * kRun>*>(ptx::dynamic_smem());
  const int i_c = blockIdx.x, first_head = blockIdx.y * kHeads;
  const int heads = g.h - first_head < kHeads ? g.h - first_head : kHeads;
  const Chunk chunk = g.chunking.at(i_c);
  if (chunk.i_seq < 0) {
    ptx::griddepcontrol_wait();
    if (int(threadIdx.x) < heads) {
      g.dA[int64_t(i_c) * g.h + first_head + threadIdx.x] = 0;
      g.d_dt_bias[int64_t(i_c) * g.h + first_head + threadIdx.x] = 0;
    }
    return;
  }
  const int i_h = threadIdx.x % kHeads, slot = threadIdx.x / kHeads;
  const int64_t row = chunk.row, head = first_head + i_h;
  constexpr int kSteps = 32 * kRun / kTokensAtOnce;
  float raw[kSteps];
  load_dt(raw, g, row * g.dt.b + (chunk.token + slot) * g.dt.l + head * g.dt.h,
          i_h < heads ? chunk.count - slot : 0);
  if (const int i = threadIdx.x / 32; i < heads)
    head_gradients<kRun>(smem, g, chunk, i_c, first_head + i, threadIdx.x % 32);
  __syncthreads();
  ptx::griddepcontrol_wait();  // in any case before the end: what comes next waits for this kernel

  float bias_sum = 0;
  if (i_h < heads) {
    const float bias = g.dt_bias.ptr ? load<float>(g.dt_bias, first_head + i_h) : 0.f;
    MAMBA2_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const int t = slot + k * kTokensAtOnce;
      if (t >= chunk.count) break;
      const int64_t token = chunk.token + t;
      const float slope = delta_slope(raw[k], bias, g.dt_softplus, g.dt_min, g.dt_max);
      const float d_dt = smem.d_delta[t][i_h] * slope;
      bias_sum += d_dt;
      store(g.d_dt.ptr, g.dt_dtype, row * g.d_dt.b + token * g.d_dt.l + head * g.d_dt.h, d_dt);
    }
  }
  smem.d_dt_bias[slot][i_h] = bias_sum;
  __syncthreads();
  if (slot == 0 && i_h < heads) {
    for (int s = 1; s < kTokensAtOnce; ++s) bias_sum += smem.d_dt_bias[s][i_h];
    g.d_dt_bias[int64_t(i_c) * g.h + first_head + i_h] = bias_sum;
  }
}

// ---- sums over chunks ----
constexpr int kSums = 3, kSumWarps = 16;
struct ChunkSums {
  const float* parts[kSums];  // (chunks, width)
  float* sum[kSums];          // (width)
  int width[kSums];
  int64_t chunks;
};
struct SumSmem {
  double partial[kSumWarps][32];
};

__global__ void MAMBA2_LAUNCH_BOUNDS(32 * kSumWarps, 2)
    sum_chunks(const MAMBA2_GRID_CONSTANT ChunkSums s) {
  ptx::griddepcontrol_wait();
  SumSmem& smem = *static_cast<SumSmem*>(ptx::dynamic_smem());
  const int which = blockIdx.y, width = s.width[which];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.x * 32 + lane;
  double sum = 0;
  if (column < width) {
    MAMBA2_UNROLL
    for (int64_t i = warp; i < s.chunks; i += kSumWarps) sum += s.parts[which][i * width + column];
  }
  smem.partial[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= width) return;
  for (int w = 1; w < kSumWarps; ++w) sum += smem.partial[w][lane];
  s.sum[which][column] = static_cast<float>(sum);
}

int launch_sums(const BackwardParams& p, const DeltaGradientParts& parts, const Gradients& g,
                void* stream) {
  ChunkSums s{};
  s.chunks = g.chunks;
  int count = 0, widest = 0;
  const auto add = [&](const float* from, void* to, int width) {
    if (!to || !from) return;
    s.parts[count] = from;
    s.sum[count] = static_cast<float*>(to);
    s.width[count++] = width;
    if (width > widest) widest = width;
  };
  add(g.dA, p.dA, g.h);
  add(g.d_dt_bias, p.d_dt_bias, g.h);
  add(parts.dD, p.dD, parts.dD_width);
  const LaunchShape at{dim3(ceil_div(widest, 32), count), 32 * kSumWarps, sizeof(SumSmem),
                       parts.programmatic};
  return launch(sum_chunks, at, stream, s);
}

template <int kRun>
int launch_gradients(const Gradients& g, void* stream) {
  const LaunchShape at{dim3(g.chunks, ceil_div(g.h, kHeads)), kThreads, sizeof(Smem<32 * kRun>),
                       g.parts.programmatic};
  return launch(delta_gradients<kRun>, at, stream, g);
}

}  // namespace

std::size_t delta_backward_workspace_bytes(int64_t chunks, int h) {
  return 2 * sizeof(float) * chunks * h;
}

int delta_backward(const BackwardParams& p, const DeltaGradientParts& parts,
                   const Chunking& chunking, int64_t chunks, void* workspace, void* stream) {
  const Range range("delta_backward");
  const Inputs& in = p.in;
  Gradients g{};
  g.parts = parts;
  g.chunking = chunking;
  g.chunks = chunks;
  g.h = in.shape.h;
  g.dt = in.dt;
  g.dt_dtype = in.dt_dtype;
  g.A = in.A;
  g.dt_bias = in.dt_bias;
  g.dt_softplus = in.dt_softplus;
  g.dt_min = float(in.dt_min);
  g.dt_max = float(in.dt_max);
  g.d_log_decay = static_cast<const float*>(p.d_log_decay);
  g.d_dt = p.d_dt;
  g.dA = static_cast<float*>(workspace);
  g.d_dt_bias = g.dA + chunks * g.h;

  int error = chunking.q == 32    ? launch_gradients<1>(g, stream)
              : chunking.q == 64  ? launch_gradients<2>(g, stream)
              : chunking.q == 128 ? launch_gradients<4>(g, stream)
                                  : launch_gradients<8>(g, stream);
  return error ? error : launch_sums(p, parts, g, stream);
}

}  // namespace mamba2::ssd
