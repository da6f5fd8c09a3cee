// causal_conv1d, backward: with v_t the convolution, g_t = dy_t act'(v_t),
//   dx_t = sum_j weight_{w-1-j} g_{t+j}   over the tokens t .. t + w - 1 of the same sequence
//   dweight_k = sum_t g_t x_{t-w+1+k},    dbias = sum_t g_t
//
// A thread takes 16 bytes of channels and a run of tokens, forwards: v_t is formed again from the
// window, g_t joins the w - 1 unfinished dx before it, and the oldest of them is written. The w - 1
// tokens after the run are read for what they give to its last dx. Sums over tokens: the thread's
// in registers, the block's warps in order through shared memory, the blocks' by sum_parts. Grid:
// (32 vectors of channels, kWarps runs of a row). Shared: kWarps x 32 x channels x (w + 1). Bound
// by memory: x and dy once, dx once; the parts are below 2% of that.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "../core/sum_parts.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBatch = 4;
constexpr int kRun = 61;  // with the 3 tokens after it, a whole number of batches

template <class U, int kWidth, int kVec>
struct WeightSums {
  U weight[kWidth][kVec], bias[kVec];

  MAMBA2_DEVICE void zero() {
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      bias[c] = 0;
      MAMBA2_UNROLL
      for (int k = 0; k < kWidth; ++k) weight[k][c] = 0;
    }
  }
  MAMBA2_DEVICE void add(const Window<U, kWidth, kVec>& window, const U (&x)[kVec],
                         const U (&g)[kVec]) {
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      bias[c] += g[c];
      weight[kWidth - 1][c] += g[c] * x[c];
      MAMBA2_UNROLL
      for (int k = 0; k < kWidth - 1; ++k) weight[k][c] += g[c] * window.x[k][c];
    }
  }
};

// The sums of a block's warps, in order, into its part: d w of dweight, then d of dbias.
template <class U, int kWidth, int kVec>
MAMBA2_DEVICE void store_parts(const WeightSums<U, kWidth, kVec>& sums, U* g_part, int tile,
                               int d) {
  constexpr int kChannels = 32 * kVec, kPerWarp = kChannels * (kWidth + 1);
  U* s_sums = static_cast<U*>(ptx::dynamic_smem());  // (kWarps, kChannels w then kChannels)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = tile * kChannels;
  U* mine = s_sums + warp * kPerWarp;
  MAMBA2_UNROLL
  for (int c = 0; c < kVec; ++c) {
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth; ++k) mine[(lane * kVec + c) * kWidth + k] = sums.weight[k][c];
    mine[kChannels * kWidth + lane * kVec + c] = sums.bias[c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPerWarp; i += kThreads) {
    U sum = s_sums[i];
    for (int w = 1; w < kWarps; ++w) sum += s_sums[w * kPerWarp + i];
    const bool of_bias = i >= kChannels * kWidth;
    const int channel = first + (of_bias ? i - kChannels * kWidth : i / kWidth);
    if (channel >= d) continue;
    g_part[of_bias ? d * kWidth + channel : channel * kWidth + i % kWidth] = sum;
  }
}

// What g gives to the last kWidth dx, but for the oldest `missing`.
template <class U, int kWidth, int kVec>
MAMBA2_DEVICE void add_gradient(const Taps<U, kWidth, kVec>& taps, const U (&g)[kVec],
                                U (&unfinished)[kWidth][kVec], int missing) {
  MAMBA2_UNROLL
  for (int k = 0; k < kWidth; ++k) {
    if (k < missing) continue;
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) unfinished[k][c] += taps.weight[k][c] * g[c];
  }
}

// What the final states give to the input at token t.
template <class T, class U, int kWidth, int kVec>
MAMBA2_DEVICE void add_final_state(const BackwardParams& params, const Place& place, int t, int i_d,
                                   U (&dx)[kVec]) {
  const int k = t - (place.end - (kWidth - 1));
  if (!params.d_final_states || place.i_seq < 0 || k < 0) return;
  const int64_t row = int64_t(place.i_seq) * (kWidth - 1) + k;
  U d_state[kVec];
  load_vector(static_cast<const T*>(params.d_final_states) + row * params.in.shape.d + i_d,
              d_state);
  MAMBA2_UNROLL
  for (int c = 0; c < kVec; ++c) dx[c] += d_state[c];
}

template <class T, int kWidth, int kVec>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 2)
    conv_backward(MAMBA2_GRID_CONSTANT const BackwardParams params, const Places places,
                  void* parts) {
  using U = accumulator_t<T>;
  const Inputs& in = params.in;
  const int l = static_cast<int>(in.shape.l), blocks_per_row = ceil_div(l, kRun * kWarps);
  const int tiles = ceil_div(in.shape.d, 32 * kVec), tile = blockIdx.x % tiles;
  const int i_part = blockIdx.x / tiles, row = i_part / blocks_per_row;
  const int run = i_part % blocks_per_row * kWarps + threadIdx.x / 32;
  const int i_d = (tile * 32 + threadIdx.x % 32) * kVec;
  const int first = run * kRun, last = first + kRun < l ? first + kRun : l;
  const int through = last + kWidth - 1 < l ? last + kWidth - 1 : l;  // tokens that are read

  WeightSums<U, kWidth, kVec> sums;
  sums.zero();
  if (i_d < in.shape.d && first < l) {
    const T* g_x = static_cast<const T*>(in.x.ptr) + row * in.x.b + i_d;
    const T* g_dy = static_cast<const T*>(params.dy.ptr) + row * params.dy.b + i_d;
    T* g_dx = static_cast<T*>(params.dx.ptr) + row * params.dx.b + i_d;
    Taps<U, kWidth, kVec> taps;
    taps.load(in.weight, in.bias, i_d);
    Window<U, kWidth, kVec> window;
    window.start(in, g_x, first, places.at(row, first), i_d);
    U unfinished[kWidth][kVec];  // dx of the tokens t - w + 1 .. t
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) unfinished[k][c] = 0;
    }
    MAMBA2_NO_UNROLL
    for (int begin = first; begin < last + kWidth - 1; begin += kBatch) {
      Packed<T, kVec> packed_x[kBatch], packed_dy[kBatch];
      MAMBA2_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        packed_x[j].zero();
        packed_dy[j].zero();
        if (begin + j < through) {
          packed_x[j].load(g_x + (begin + j) * in.x.l);
          packed_dy[j].load(g_dy + (begin + j) * params.dy.l);
        }
      }
      MAMBA2_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int t = begin + j, finished = t - (kWidth - 1);
        const Place place = t < l ? places.at(row, t) : Place{-1, 0, 0};
        if (places.table && t == place.begin) window.start(in, g_x, t, place, i_d);
        U x[kVec], g[kVec];
        packed_x[j].unpack(x);
        packed_dy[j].unpack(g);
        if (place.i_seq < 0) {
          MAMBA2_UNROLL
          for (int c = 0; c < kVec; ++c) x[c] = g[c] = 0;
        } else if (in.silu) {
          MAMBA2_UNROLL
          for (int c = 0; c < kVec; ++c) {
            g[c] *= fast::silu_gradient(window.convolve(taps, x[c], c));
          }
        }
        if (t < last && place.i_seq >= 0) sums.add(window, x, g);
        window.push(x);
        if (!places.table || finished >= place.begin) {
          add_gradient<U, kWidth, kVec>(taps, g, unfinished, 0);
        } else {  // none reaches a token of another sequence
          add_gradient<U, kWidth, kVec>(taps, g, unfinished, place.begin - finished);
        }
        if (finished >= first && finished < last) {
          add_final_state<T, U, kWidth>(params, places.at(row, finished), finished, i_d,
                                        unfinished[0]);
          store_vector(g_dx + finished * params.dx.l, unfinished[0]);
        }
        MAMBA2_UNROLL
        for (int k = 0; k < kWidth; ++k) {
          MAMBA2_UNROLL
          for (int c = 0; c < kVec; ++c) {
            unfinished[k][c] = k + 1 < kWidth ? unfinished[k + 1 < kWidth ? k + 1 : 0][c] : U(0);
          }
        }
      }
    }
  }
  U* part = static_cast<U*>(parts) + int64_t(i_part) * in.shape.d * (kWidth + 1);
  store_parts<U, kWidth, kVec>(sums, part, tile, in.shape.d);
}

// d_initial_states: what the first w - 1 tokens of a sequence, and the final states of one that is
// shorter than that, give to them. Grid: threads over (sequence, d).
template <class T, int kWidth>
__global__ void MAMBA2_LAUNCH_BOUNDS(128, 4)
    conv_initial_states(MAMBA2_GRID_CONSTANT const BackwardParams params, const Places places) {
  using U = accumulator_t<T>;
  constexpr int kBefore = kWidth - 1;
  const Inputs& in = params.in;
  const int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const int i_d = static_cast<int>(i % in.shape.d), i_seq = static_cast<int>(i / in.shape.d);
  if (i_seq >= in.shape.nseq) return;
  const Place place = places.of(i_seq);
  const int64_t row = in.shape.packed ? 0 : i_seq;
  const T* g_x = static_cast<const T*>(in.x.ptr) + row * in.x.b + i_d;
  const T* g_dy = static_cast<const T*>(params.dy.ptr) + row * params.dy.b + i_d;
  Taps<U, kWidth, 1> taps;
  taps.load(in.weight, in.bias, i_d);
  Window<U, kWidth, 1> window;
  window.start(in, g_x, place.begin, place, i_d);

  U dx[kBefore][1];
  for (int k = 0; k < kBefore; ++k) {
    const int length = place.end - place.begin, final_row = k - length;
    dx[k][0] = 0;
    if (!params.d_final_states || final_row < 0) continue;
    const int64_t at = (int64_t(i_seq) * kBefore + final_row) * in.shape.d + i_d;
    dx[k][0] = convert<U>(static_cast<const T*>(params.d_final_states)[at]);
  }
  MAMBA2_UNROLL
  for (int j = 0; j < kBefore; ++j) {
    const int t = place.begin + j;
    if (t >= place.end) break;
    U x[1] = {convert<U>(g_x[t * in.x.l])};
    U g = convert<U>(g_dy[t * params.dy.l]);
    if (in.silu) g *= fast::silu_gradient(window.convolve(taps, x[0], 0));
    MAMBA2_UNROLL
    for (int k = 0; j + k < kBefore; ++k) dx[j + k][0] += taps.weight[k][0] * g;
    window.push(x);
  }
  T* out = static_cast<T*>(params.d_initial_states) + int64_t(i_seq) * kBefore * in.shape.d + i_d;
  for (int k = 0; k < kBefore; ++k) out[int64_t(k) * in.shape.d] = convert<T>(dx[k][0]);
}

int64_t parts_of(const Shape& shape) { return shape.b * ceil_div(shape.l, kRun * kWarps); }
std::size_t aligned(std::size_t bytes) { return round_up(bytes, std::size_t(1024)); }

template <class T>
int run_backward(const BackwardParams& params, const Places& places, void* parts, void* stream) {
  const Shape& shape = params.in.shape;
  const bool vectors = in_vectors(shape.d, params.in.dtype);
  int error = with_width<T>(shape.w, vectors, [&](auto, auto width, auto channels) {
    LaunchShape at;
    at.grid = dim3(static_cast<unsigned>(parts_of(shape) * ceil_div(shape.d, 32 * channels())));
    at.threads = kThreads;
    at.smem_bytes = sizeof(accumulator_t<T>) * kThreads * channels() * (width() + 1);
    return launch(conv_backward<T, width(), channels()>, at, stream, params, places, parts);
  });
  if (error || !params.d_initial_states) return error;
  return with_width<T>(shape.w, false, [&](auto, auto width, auto) {
    LaunchShape at;
    at.grid = dim3(static_cast<unsigned>(ceil_div(shape.nseq * shape.d, 128)));
    at.threads = 128;
    return launch(conv_initial_states<T, width()>, at, stream, params, places);
  });
}

}  // namespace

std::size_t backward_workspace_bytes(const Shape& shape, DType dtype) {
  const std::size_t element = dtype == DType::f64 ? 8 : 4;
  return aligned(places_bytes(shape)) + element * parts_of(shape) * shape.d * (shape.w + 1);
}

int backward(const BackwardParams& params, void* workspace, void* stream) {
  const Shape& shape = params.in.shape;
  Places places;
  if (const int error = make_places(params.in, workspace, &places, stream)) return error;
  void* parts = static_cast<char*>(workspace) + aligned(places_bytes(shape));
  const int error = with_type(params.in.dtype, [&](auto tag) {
    return run_backward<typename decltype(tag)::type>(params, places, parts, stream);
  });
  if (error) return error;
  SumPartsParams sum;
  sum.parts = parts;
  sum.count = parts_of(shape);
  sum.numel = int64_t(shape.d) * (shape.w + 1);
  sum.split = int64_t(shape.d) * shape.w;
  sum.first = params.dweight;
  sum.second = params.dbias;
  sum.dtype = params.in.dtype == DType::f64 ? DType::f64 : DType::f32;
  return sum_parts(sum, stream);
}

}  // namespace mamba2::causal_conv1d
