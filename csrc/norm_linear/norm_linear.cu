// norm_linear on tensor cores (see norm_linear.h for the equation).
//
// A block makes 16 outputs of 8 rows. Its weights are on their way before it waits for the kernel
// in front; it norms its rows into shared memory, as all blocks do; then each warp multiplies its
// share of the channels, 32 at a time, and the block adds the warps' sums.
// The products are weight (16, k) times v^T (k, 8): a thread's fragments are 16 consecutive bytes
// of a row on both sides, which orders k differently than the instruction's manual does, and on
// both sides alike.
// Grid: (outputs / 16, rows / 8). Shared memory: 8 x (d + 32) operands, or the 8 warps' 16 x 8
// sums. Bound by the latency of one trip to memory; with many rows by norming them in every block.
// Not for fp32 and fp64 weights, several groups, or rows that are no whole number of 16 bytes:
// norm_linear_any.
// Deterministic; a row's result does not depend on the others.
#include "norm_linear.h"

#include "../core/activations.cuh"
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "../ptx/sm80.cuh"
#include "norm_linear_any.h"

namespace mamba2::norm_linear {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kOutputs = 16;            // of a block: the rows of an mma
constexpr int kRows = 8;                // and its columns
constexpr int kChunk = 32;              // channels that a warp multiplies at once
constexpr int kVec = 8;                 // channels of a thread at once: 16 bytes of operands
constexpr int kSlab = kThreads * kVec;  // channels of a block at once
constexpr int kPad = 32;  // of a row in shared memory: eight rows by 16 bytes meet every bank once
constexpr unsigned kAllLanes = 0xffffffffu;

MAMBA2_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
MAMBA2_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }

template <class T>
using Vector = Packed<T, kVec>;

MAMBA2_DEVICE void load_floats(const AnyFloat& from, int at, float (&to)[kVec]) {
  if (from.dtype == DType::f32) {
    load_vector(static_cast<const float*>(from.ptr) + at, to);
  } else if (from.dtype == DType::bf16) {
    load_vector(static_cast<const bf16*>(from.ptr) + at, to);
  } else {
    for (int c = 0; c < kVec; ++c) to[c] = load<float>(from, at + c);
  }
}

// Rows that a block norms at once, and chunks of a warp's weights in flight: for one row all of
// 1536 channels, for more what two blocks an SM leave registers for.
constexpr int chunks_ahead(int rows_at_once) { return rows_at_once == 1 ? 6 : 3; }

// One thread's channels of kAtOnce rows, as they lie in memory.
template <class X, int kAtOnce>
struct Slab {
  Vector<X> x[kAtOnce], z[kAtOnce];

  MAMBA2_DEVICE void load(const Params& params, int64_t first_row, int rows, int k) {
    MAMBA2_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r >= rows) continue;
      const int64_t row = first_row + r;
      x[r].load(static_cast<const X*>(params.x.ptr) + row * params.x.stride + k);
      if (!params.z.ptr) continue;
      z[r].load(static_cast<const X*>(params.z.ptr) + row * params.z.stride + k);
    }
  }
  // What is normed of row r, and the gate behind the norm.
  MAMBA2_DEVICE void gated(const Params& params, int r, float (&v)[kVec],
                           float (&outside)[kVec]) const {
    x[r].unpack(v);
    MAMBA2_UNROLL
    for (float& factor : outside) factor = 1.f;
    if (!params.z.ptr) return;
    float gate[kVec];
    z[r].unpack(gate);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      const Gate<float> g = gate_of(fast::silu(gate[c]), params.norm_before_gate);
      v[c] *= g.inside;
      outside[c] = g.outside;
    }
  }
};

// Sums over the block of one value a row and thread, in a fixed order. s_sums (kAtOnce, kWarps).
template <int kAtOnce>
MAMBA2_DEVICE void sum_over_block(float (&v)[kAtOnce], int rows, float* s_sums) {
  MAMBA2_UNROLL
  for (int r = 0; r < kAtOnce; ++r) {
    if (r >= rows) continue;
    MAMBA2_UNROLL
    for (int step = 16; step > 0; step /= 2) v[r] += __shfl_xor_sync(kAllLanes, v[r], step);
    if (lane() == 0) s_sums[r * kWarps + warp()] = v[r];
  }
  __syncthreads();
  MAMBA2_UNROLL
  for (int r = 0; r < kAtOnce; ++r) {
    if (r >= rows) continue;
    v[r] = 0;
    MAMBA2_UNROLL
    for (int w = 0; w < kWarps; ++w) v[r] += s_sums[r * kWarps + w];
  }
}

template <class T>
MAMBA2_DEVICE void put(T* s_row, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(s_row) = uint4{v.words[0], v.words[1], v.words[2], v.words[3]};
}

// kAtOnce rows, of which `rows` exist, normed and rounded into s_v (kAtOnce, d + kPad), with zeros
// behind d: the last chunk may be longer than the row. weight: norm_weight at the thread's first
// channels.
template <class T, class X, int kAtOnce>
MAMBA2_DEVICE void norm_rows(const Params& params, int64_t first_row, int rows,
                             const float (&first_weight)[kVec], T* s_v, float* s_sums) {
  const int first_k = static_cast<int>(threadIdx.x) * kVec, row_stride = params.d + kPad;
  const int last_k = first_k + (ceil_div(params.d, kSlab) - 1) * kSlab;
  Slab<X, kAtOnce> slab;
  float r_rms[kAtOnce] = {}, weight[kVec], v[kVec], outside[kVec];
  MAMBA2_UNROLL
  for (int c = 0; c < kVec; ++c) weight[c] = first_weight[c];
  MAMBA2_NO_UNROLL
  for (int k = last_k; k >= first_k; k -= kSlab) {  // backwards: the first stays in registers
    if (k >= params.d) continue;
    slab.load(params, first_row, rows, k);
    MAMBA2_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r >= rows) continue;
      slab.gated(params, r, v, outside);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) r_rms[r] += v[c] * v[c];
    }
  }
  sum_over_block(r_rms, rows, s_sums);
  MAMBA2_NO_UNROLL
  for (int k = first_k; k < params.d; k += kSlab) {
    if (k != first_k) {
      slab.load(params, first_row, rows, k);
      load_floats(params.norm_weight, k, weight);
    }
    MAMBA2_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r >= rows) continue;
      slab.gated(params, r, v, outside);
      const float scale = 1.f / sqrtf(r_rms[r] / float(params.d) + float(params.eps));
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) v[c] *= scale * weight[c] * outside[c];
      Vector<T> rounded;
      rounded.pack(v);
      put(s_v + r * row_stride + k, rounded);
    }
  }
  constexpr int kVectorsOfPad = kPad / kVec;
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kAtOnce * kVectorsOfPad) return;
  Vector<T> zeros;
  zeros.zero();
  put(s_v + i / kVectorsOfPad * row_stride + params.d + i % kVectorsOfPad * kVec, zeros);
}

// 16 outputs by 32 channels of the weights, as a warp's two A fragments: rows r and r + 8 a lane.
template <class T>
struct WeightChunk {
  Vector<T> low, high;

  MAMBA2_DEVICE void load(const Params& params, int output, int k) {
    const T* g_weight = static_cast<const T*>(params.weight) + int64_t(output) * params.d + k;
    low.zero();
    high.zero();
    if (k >= params.d) return;
    if (output < params.o) low.load(g_weight);
    if (output + 8 < params.o) high.load(g_weight + int64_t(8) * params.d);
  }
  // sums (16 outputs, 8 rows) += weights v^T; s_v at the lane's row and channels.
  MAMBA2_DEVICE void multiply(float (&sums)[4], const T* s_v) const {
    const uint4 v = *reinterpret_cast<const uint4*>(s_v);
    const uint32_t a[2][4] = {{low.words[0], high.words[0], low.words[1], high.words[1]},
                              {low.words[2], high.words[2], low.words[3], high.words[3]}};
    ptx::mma_m16n8k16<T>(sums, a[0], v.x, v.y);
    ptx::mma_m16n8k16<T>(sums, a[1], v.z, v.w);
  }
};

MAMBA2_DEVICE void store_output(const Params& params, int64_t row, int output, float sum) {
  if (params.bias) sum += load<float>(params.bias, output);
  const int64_t at = row * params.out.stride + output;
  if (params.add) sum += load<float>(AnyFloat{params.out.ptr, params.out_dtype}, at);
  store(params.out.ptr, params.out_dtype, at, sum);
}

struct Sums {
  float of_rows[kRows][kWarps];
  float of_warps[kWarps][kRows][kOutputs];
};

template <class T, class X, int kAtOnce>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 2)
    norm_linear(MAMBA2_GRID_CONSTANT const Params params) {
  constexpr int kAhead = chunks_ahead(kAtOnce);
  Sums& sums = *static_cast<Sums*>(ptx::dynamic_smem());
  T* s_v = reinterpret_cast<T*>(&sums + 1);  // (kRows, d + kPad)
  const int quad = lane() / 4, first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const int64_t first_row = int64_t(blockIdx.y) * kRows, left = params.b - first_row;
  const int rows = left < kRows ? static_cast<int>(left) : kRows;
  const auto channel = [&](int chunk) { return chunk * kChunk + lane() % 4 * kVec; };

  ptx::griddepcontrol_launch_dependents();
  if (!params.early_weights) ptx::griddepcontrol_wait();
  WeightChunk<T> weights[kAhead];
  MAMBA2_UNROLL
  for (int i = 0; i < kAhead; ++i) {
    weights[i].load(params, first_output + quad, channel(warp() + i * kWarps));
  }
  float norm_weight[kVec];
  const int first_k = static_cast<int>(threadIdx.x) * kVec;
  if (first_k < params.d) load_floats(params.norm_weight, first_k, norm_weight);
  ptx::griddepcontrol_wait();
  const int row_stride = params.d + kPad;
  MAMBA2_NO_UNROLL
  for (int r = 0; r < rows; r += kAtOnce) {
    norm_rows<T, X, kAtOnce>(params, first_row + r, rows - r, norm_weight, s_v + r * row_stride,
                             sums.of_rows[r]);
  }
  __syncthreads();

  float r_sums[4] = {};
  const int chunks = ceil_div(params.d, kChunk);
  MAMBA2_NO_UNROLL
  for (int begin = warp(); begin < chunks; begin += kAhead * kWarps) {
    MAMBA2_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = begin + i * kWarps;
      if (chunk >= chunks) break;
      const WeightChunk<T> now = weights[i];
      weights[i].load(params, first_output + quad, channel(chunk + kAhead * kWarps));
      now.multiply(r_sums, s_v + quad * row_stride + channel(chunk));
    }
  }
  MAMBA2_UNROLL
  for (int e = 0; e < 4; ++e) {
    sums.of_warps[warp()][lane() % 4 * 2 + e % 2][quad + e / 2 * 8] = r_sums[e];
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / kOutputs;
  const int of_block = static_cast<int>(threadIdx.x) % kOutputs;
  if (row >= rows || first_output + of_block >= params.o) return;
  float sum = 0;
  MAMBA2_UNROLL
  for (int w = 0; w < kWarps; ++w) sum += sums.of_warps[w][row][of_block];
  store_output(params, first_row + row, first_output + of_block, sum);
}

std::size_t smem_bytes(const Params& params) {
  return sizeof(Sums) + size_of(params.dtype) * kRows * (params.d + kPad);
}

bool aligned(const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % kVectorBytes == 0; }
bool fits(const Params& params) {
  constexpr std::size_t kMost = 99 << 10;  // shared memory of a block on any card
  const bool half = size_of(params.dtype) == 2;
  const bool x_fits = params.x_dtype == params.dtype || params.x_dtype == DType::f32;
  const bool strides =
      params.x.stride % kVec == 0 && (!params.z.ptr || params.z.stride % kVec == 0);
  return half && x_fits && strides && params.d % kVec == 0 && params.s == params.d &&
         aligned(params.x.ptr) && aligned(params.z.ptr) && aligned(params.weight) &&
         aligned(params.norm_weight.ptr) && smem_bytes(params) <= kMost &&
         ceil_div(params.b, kRows) <= 65535;
}

template <class T, class X>
int run_as(const Params& params, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(params.o, kOutputs)),
                 static_cast<unsigned>(ceil_div(params.b, kRows)));
  at.threads = kThreads;
  at.smem_bytes = smem_bytes(params);
  at.programmatic = true;
  return params.b == 1 ? launch(norm_linear<T, X, 1>, at, stream, params)
                       : launch(norm_linear<T, X, 2>, at, stream, params);
}
template <class T>
int run_as(const Params& params, void* stream) {
  return params.x_dtype == DType::f32 ? run_as<T, float>(params, stream)
                                      : run_as<T, T>(params, stream);
}

}  // namespace

int run(const Params& params, void* stream) {
  if (params.b == 0 || params.o == 0) return 0;
  if (!fits(params)) return run_any(params, stream);
  return params.dtype == DType::bf16 ? run_as<bf16>(params, stream) : run_as<f16>(params, stream);
}

}  // namespace mamba2::norm_linear
