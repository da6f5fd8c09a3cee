// norm_linear on tensor cores (see norm_linear.h for the equation).
//
// A block makes 16 outputs of every row. Its weights are on their way before it waits for the
// kernel in front; it norms the rows into shared memory, as all blocks do, a warp a row; then each
// warp multiplies its share of the channels, 32 at a time, and the block adds the warps' sums.
// The products are weight (16, k) times v^T (k, rows): a thread's fragments are 16 consecutive
// bytes of a row on both sides, which orders k differently than the instruction's manual does, and
// on both sides alike.
// Grid: outputs / 16. Shared memory: rows x (d + 32) operands, over them 8 x 16 x rows sums.
// Bound by memory: the weights once; with many rows by reading them in every block.
// Not for fp32 and fp64 weights, more than 64 rows, several groups, or rows that are no whole
// number of 16 bytes: norm_linear_any.
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
constexpr int kOutputs = 16;  // of a block: the rows of an mma
constexpr int kChunk = 32;    // channels that a warp multiplies at once
constexpr int kVec = 8;       // channels of a thread at once: 16 bytes of operands
// Chunks of a warp's weights in flight: all of 1536 channels where registers allow.
constexpr int chunks_ahead(int tiles) { return tiles <= 2 ? 6 : 3; }
constexpr int kMaxRows = 64;
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

// The rows of one warp, kRows of them at once.
template <class T, class X, int kRows>
struct RowNorm {
  const Params& params;
  int64_t first;  // and every kWarps-th after it

  MAMBA2_DEVICE int64_t row(int i) const { return first + int64_t(i) * kWarps; }

  // f(i, v, outside) for each row i: v is what is normed, outside the gate behind the norm.
  template <class F>
  MAMBA2_DEVICE void each_row(int k, F f) const {
    Vector<X> x[kRows], z[kRows];
    const bool has_z = params.z.ptr != nullptr;
    MAMBA2_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= params.b) continue;
      x[i].load(static_cast<const X*>(params.x.ptr) + row(i) * params.x.stride + k);
      if (has_z) z[i].load(static_cast<const X*>(params.z.ptr) + row(i) * params.z.stride + k);
    }
    MAMBA2_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= params.b) continue;
      float v[kVec], gate[kVec];
      x[i].unpack(v);
      if (has_z) z[i].unpack(gate);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) {
        Gate<float> g;
        if (has_z) g = gate_of(fast::silu(gate[c]), params.norm_before_gate);
        v[c] *= g.inside;
        gate[c] = g.outside;
      }
      f(i, v, gate);
    }
  }

  // Rows of s_v, with zeros behind them: the last chunk may be longer than the row.
  MAMBA2_DEVICE void run(T* s_v) const {
    float sum[kRows] = {};
    for (int k = lane() * kVec; k < params.d; k += 32 * kVec) {
      each_row(k, [&](int i, const float (&v)[kVec], const float (&)[kVec]) {
        MAMBA2_UNROLL
        for (int c = 0; c < kVec; ++c) sum[i] += v[c] * v[c];
      });
    }
    MAMBA2_UNROLL
    for (int i = 0; i < kRows; ++i) {
      MAMBA2_UNROLL
      for (int step = 16; step > 0; step /= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], step);
      sum[i] = 1.f / sqrtf(sum[i] / float(params.d) + float(params.eps));
    }
    for (int k = lane() * kVec; k < params.d; k += 32 * kVec) {
      float weight[kVec];
      load_floats(params.norm_weight, k, weight);
      each_row(k, [&](int i, float (&v)[kVec], const float (&outside)[kVec]) {
        MAMBA2_UNROLL
        for (int c = 0; c < kVec; ++c) v[c] *= sum[i] * weight[c] * outside[c];
        Vector<T> rounded;
        rounded.pack(v);
        put(s_v, i, k, rounded);
      });
    }
    if (lane() >= kPad / kVec) return;
    Vector<T> zeros;
    zeros.zero();
    MAMBA2_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (row(i) < params.b) put(s_v, i, params.d + lane() * kVec, zeros);
    }
  }

  MAMBA2_DEVICE void put(T* s_v, int i, int k, const Vector<T>& v) const {
    const uint4 words{v.words[0], v.words[1], v.words[2], v.words[3]};
    *reinterpret_cast<uint4*>(s_v + row(i) * (params.d + kPad) + k) = words;
  }
};

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
};

// sums (16 outputs, 8 rows a tile) += weights v^T.
template <class T, int kTiles>
MAMBA2_DEVICE void multiply(float (&sums)[kTiles][4], const WeightChunk<T>& w, const T* s_row,
                            int row_stride) {
  const uint32_t a[2][4] = {{w.low.words[0], w.high.words[0], w.low.words[1], w.high.words[1]},
                            {w.low.words[2], w.high.words[2], w.low.words[3], w.high.words[3]}};
  MAMBA2_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4 v = *reinterpret_cast<const uint4*>(s_row + int64_t(tile) * 8 * row_stride);
    ptx::mma_m16n8k16<T>(sums[tile], a[0], v.x, v.y);
    ptx::mma_m16n8k16<T>(sums[tile], a[1], v.z, v.w);
  }
}

MAMBA2_DEVICE void store_output(const Params& params, int64_t row, int output, float sum) {
  if (params.bias) sum += load<float>(params.bias, output);
  const int64_t at = row * params.out.stride + output;
  if (params.add) sum += load<float>(AnyFloat{params.out.ptr, params.out_dtype}, at);
  store(params.out.ptr, params.out_dtype, at, sum);
}

template <class T, class X, int kTiles>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    norm_linear(MAMBA2_GRID_CONSTANT const Params params) {
  constexpr int kRowsAtOnce = kTiles < 4 ? kTiles : 4, kRows = 8 * kTiles;
  constexpr int kAhead = chunks_ahead(kTiles);
  T* s_v = static_cast<T*>(ptx::dynamic_smem());             // (kRows, d + kPad)
  float* s_sums = static_cast<float*>(ptx::dynamic_smem());  // (kWarps, kRows, kOutputs), later
  const int row_stride = params.d + kPad, quad = lane() / 4;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const auto channel = [&](int chunk) { return chunk * kChunk + lane() % 4 * kVec; };

  ptx::griddepcontrol_launch_dependents();
  if (!params.early_weights) ptx::griddepcontrol_wait();
  WeightChunk<T> weights[kAhead];
  MAMBA2_UNROLL
  for (int i = 0; i < kAhead; ++i) {
    weights[i].load(params, first_output + quad, channel(warp() + i * kWarps));
  }
  ptx::griddepcontrol_wait();
  MAMBA2_NO_UNROLL
  for (int64_t first = warp(); first < kRows; first += kRowsAtOnce * kWarps) {
    RowNorm<T, X, kRowsAtOnce>{params, first}.run(s_v);
  }
  __syncthreads();

  float sums[kTiles][4] = {};
  const int chunks = ceil_div(params.d, kChunk);
  MAMBA2_NO_UNROLL
  for (int begin = warp(); begin < chunks; begin += kAhead * kWarps) {
    MAMBA2_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = begin + i * kWarps;
      if (chunk >= chunks) break;
      const WeightChunk<T> now = weights[i];
      weights[i].load(params, first_output + quad, channel(chunk + kAhead * kWarps));
      multiply<T, kTiles>(sums, now, s_v + int64_t(quad) * row_stride + channel(chunk), row_stride);
    }
  }
  __syncthreads();  // s_v is read; the sums take its place
  MAMBA2_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    MAMBA2_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = 8 * tile + lane() % 4 * 2 + e % 2, output = quad + e / 2 * 8;
      s_sums[(warp() * kRows + row) * kOutputs + output] = sums[tile][e];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kOutputs; i += kThreads) {
    const int row = i / kOutputs, output = first_output + i % kOutputs;
    if (row >= params.b || output >= params.o) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += s_sums[w * kRows * kOutputs + i];
    store_output(params, row, output, sum);
  }
}

std::size_t smem_bytes(const Params& params, int rows) {
  const std::size_t operands = size_of(params.dtype) * rows * (params.d + kPad);
  const std::size_t sums = sizeof(float) * kWarps * kOutputs * rows;
  return operands > sums ? operands : sums;
}
int rows_of_tiles(int64_t b) { return b <= 8 ? 8 : b <= 16 ? 16 : b <= 32 ? 32 : 64; }

bool aligned(const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % kVectorBytes == 0; }
bool fits(const Params& params, int major) {
  constexpr std::size_t kMost = 99 << 10, kMostOnHopper = 227 << 10;  // shared memory of a block
  const std::size_t most = major == 9 ? kMostOnHopper : kMost;
  const bool half = size_of(params.dtype) == 2;
  const bool x_fits = params.x_dtype == params.dtype || params.x_dtype == DType::f32;
  const bool strides =
      params.x.stride % kVec == 0 && (!params.z.ptr || params.z.stride % kVec == 0);
  return half && x_fits && strides && params.d % kVec == 0 && params.s == params.d &&
         params.b <= kMaxRows && aligned(params.x.ptr) && aligned(params.z.ptr) &&
         aligned(params.weight) && aligned(params.norm_weight.ptr) &&
         smem_bytes(params, rows_of_tiles(params.b)) <= most;
}

template <class T, class X>
int run_as(const Params& params, void* stream) {
  const int rows = rows_of_tiles(params.b);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(ceil_div(params.o, kOutputs)));
  at.threads = kThreads;
  at.smem_bytes = smem_bytes(params, rows);
  at.programmatic = true;
  if (rows == 8) return launch(norm_linear<T, X, 1>, at, stream, params);
  if (rows == 16) return launch(norm_linear<T, X, 2>, at, stream, params);
  if (rows == 32) return launch(norm_linear<T, X, 4>, at, stream, params);
  return launch(norm_linear<T, X, 8>, at, stream, params);
}
template <class T>
int run_as(const Params& params, void* stream) {
  return params.x_dtype == DType::f32 ? run_as<T, float>(params, stream)
                                      : run_as<T, T>(params, stream);
}

}  // namespace

int run(const Params& params, int major, void* stream) {
  if (params.b == 0 || params.o == 0) return 0;
  if (!fits(params, major)) return run_any(params, stream);
  return params.dtype == DType::bf16 ? run_as<bf16>(params, stream) : run_as<f16>(params, stream);
}

}  // namespace mamba2::norm_linear
