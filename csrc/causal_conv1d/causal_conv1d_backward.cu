// causal_conv1d, backward: with v_t the convolution, g_t = dy_t act'(v_t),
//   dx_t = sum_j weight_{w-1-j} g_{t+j}   over the tokens t .. t + w - 1 of the same sequence
//   dweight_k = sum_t g_t x_{t-w+1+k},    dbias = sum_t g_t
//
// A block takes 256 neighbouring channels and a run of tokens, forwards, a thread 4 of the
// channels: v_t is formed again from the window, g_t joins the w - 1 unfinished dx before it, and
// the oldest of them is written. The w - 1 tokens after the run are read for what they give to its
// last dx. The loads of kBatch tokens are in flight together; a batch inside one sequence looks at
// nothing but its inputs. Sums over tokens: the thread's in registers, the blocks' by sum_parts.
// Grid: tiles of channels, the fastest, times runs. No shared memory.
// Bound by memory: x and dy once, dx once; the parts are about 1% of that.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "../core/sum_parts.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

// 128 registers a thread; fp16 takes a few more to unpack.
constexpr int blocks_per_sm(DType dtype) { return dtype == DType::f16 ? 6 : 8; }

// Long runs: short ones cost sums to be added and 2 (w - 1) tokens more.
constexpr int kEnoughTokens = 1 << 20;

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
  // Into a part: d w of dweight, then d of dbias.
  MAMBA2_DEVICE void store(U* g_part, int d, int i_d) const {
    U of_channel[kVec * kWidth];
    MAMBA2_UNROLL
    for (int i = 0; i < kVec * kWidth; ++i) of_channel[i] = weight[i % kWidth][i / kWidth];
    MAMBA2_UNROLL
    for (int i = 0; i < kVec * kWidth; ++i) g_part[i_d * kWidth + i] = of_channel[i];
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) g_part[d * kWidth + i_d + c] = bias[c];
  }
};

// dx of the last kWidth - 1 tokens, the oldest first: later tokens still add to them.
template <class U, int kWidth, int kVec>
struct Unfinished {
  U dx[kWidth - 1][kVec];

  MAMBA2_DEVICE void zero() {
    MAMBA2_UNROLL
    for (auto& of_token : dx) {
      MAMBA2_UNROLL
      for (U& v : of_token) v = 0;
    }
  }
  // Adds what the next token's g gives, but not to the oldest `missing`; returns the oldest dx,
  // which is finished.
  MAMBA2_DEVICE void add(const Taps<U, kWidth, kVec>& taps, const U (&g)[kVec], int missing,
                         U (&finished)[kVec]) {
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      finished[c] = dx[0][c] + (missing > 0 ? U(0) : taps.weight[0][c] * g[c]);
      MAMBA2_UNROLL
      for (int k = 1; k < kWidth; ++k) {
        const U before = k + 1 < kWidth ? dx[k + 1 < kWidth ? k : 0][c] : U(0);
        dx[k - 1][c] = before + (missing > k ? U(0) : taps.weight[k][c] * g[c]);
      }
    }
  }
};

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
__global__ void MAMBA2_LAUNCH_BOUNDS(kRunThreads, blocks_per_sm(DTypeOf<T>::value))
    conv_backward(MAMBA2_GRID_CONSTANT const BackwardParams params, const Places places,
                  const Runs runs, void* parts) {
  using U = accumulator_t<T>;
  using Vector = Packed<T, kVec>;
  constexpr int kBefore = kWidth - 1;
  const Inputs& in = params.in;
  const RunOfBlock at(in.shape, kVec, runs);
  if (at.i_d >= in.shape.d) return;
  const int l = static_cast<int>(in.shape.l);
  // The block's row: what is added to find a token is the same for all threads.
  const T* g_x = static_cast<const T*>(in.x.ptr) + at.row * in.x.b;
  const T* g_dy = static_cast<const T*>(params.dy.ptr) + at.row * params.dy.b;
  T* g_dx = static_cast<T*>(params.dx.ptr) + at.row * params.dx.b;
  Taps<U, kWidth, kVec> taps;
  taps.load(in.weight, in.bias, at.i_d);
  Window<U, kWidth, kVec> window;
  window.start(in, g_x + at.i_d, at.first, places.at(at.row, at.first), at.i_d);
  WeightSums<U, kWidth, kVec> sums;
  sums.zero();
  Unfinished<U, kWidth, kVec> unfinished;
  unfinished.zero();

  // The token after the window: its sums, and dx of the token kBefore before it.
  const auto token = [&](const Vector& packed_x, const Vector& packed_dy, bool own, int missing,
                         U(&dx)[kVec]) {
    U x[kVec], g[kVec];
    packed_x.unpack(x);
    packed_dy.unpack(g);
    if (in.silu) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) g[c] *= fast::silu_gradient(window.convolve(taps, x[c], c));
    }
    unfinished.add(taps, g, missing, dx);
    if (own) sums.add(window, x, g);
    window.push(x);
  };
  // A token anywhere: at a sequence's ends, of no sequence, after the run or after the row.
  const auto checked_token = [&](int t) {
    const Place place = t < l ? places.at(at.row, t) : Place{-1, 0, 0};
    const int finished = t - kBefore;
    Vector packed_x, packed_dy;
    packed_x.zero();
    packed_dy.zero();
    if (place.i_seq >= 0) {
      packed_x.load(g_x + t * in.x.l + at.i_d);
      packed_dy.load(g_dy + t * params.dy.l + at.i_d);
    }
    if (place.i_seq < 0 || (places.table && t == place.begin)) {
      window.start(in, g_x + at.i_d, t, place, at.i_d);
    }
    const int missing = places.table ? place.begin - finished : 0;
    U dx[kVec];
    token(packed_x, packed_dy, t < at.last, missing, dx);
    if (finished < at.first || finished >= at.last) return;
    add_final_state<T, U, kWidth>(params, places.at(at.row, finished), finished, at.i_d, dx);
    store_vector(g_dx + finished * params.dx.l + at.i_d, dx);
  };
  MAMBA2_NO_UNROLL
  for (int begin = at.first; begin < at.last + kBefore; begin += kBatch<T>) {
    if (begin + kBatch<T> <= at.last && places.at(at.row, begin).holds(begin, kBefore, kBatch<T>)) {
      Batch<T, kVec> x, dy;
      x.load(g_x + begin * in.x.l, in.x.l, at.i_d);
      dy.load(g_dy + begin * params.dy.l, params.dy.l, at.i_d);
      T* g_dx_t = g_dx + (begin - kBefore) * params.dx.l;
      MAMBA2_UNROLL
      for (int j = 0; j < kBatch<T>; ++j, g_dx_t += params.dx.l) {
        U dx[kVec];
        token(x.token[j], dy.token[j], true, 0, dx);
        if (j >= kBefore || begin > at.first) store_vector(g_dx_t + at.i_d, dx);
      }
      continue;
    }
    MAMBA2_NO_UNROLL
    for (int t = begin; t < begin + kBatch<T> && t < at.last + kBefore; ++t) checked_token(t);
  }
  sums.store(static_cast<U*>(parts) + int64_t(at.i_run) * in.shape.d * (kWidth + 1), in.shape.d,
             at.i_d);
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

Runs runs_of(const Shape& shape, DType dtype) {
  return Runs(shape, in_vectors(shape.d, dtype) ? kChannels : 1, blocks_per_sm(dtype),
              kEnoughTokens);
}
std::size_t aligned(std::size_t bytes) { return round_up(bytes, std::size_t(1024)); }

template <class T>
int run_backward(const BackwardParams& params, const Places& places, void* parts, void* stream) {
  const Shape& shape = params.in.shape;
  const bool vectors = in_vectors(shape.d, params.in.dtype);
  const Runs runs = runs_of(shape, params.in.dtype);
  const int error = with_width<T>(shape.w, vectors, [&](auto, auto width, auto channels) {
    LaunchShape at;
    at.grid = runs.grid();
    at.threads = kRunThreads;
    return launch(conv_backward<T, width(), channels()>, at, stream, params, places, runs, parts);
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
  return aligned(places_bytes(shape)) +
         element * runs_of(shape, dtype).count * shape.d * (shape.w + 1);
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
  sum.count = runs_of(shape, params.in.dtype).count;
  sum.numel = int64_t(shape.d) * (shape.w + 1);
  sum.split = int64_t(shape.d) * shape.w;
  sum.first = params.dweight;
  sum.second = params.dbias;
  sum.dtype = params.in.dtype == DType::f64 ? DType::f64 : DType::f32;
  return sum_parts(sum, stream);
}

}  // namespace mamba2::causal_conv1d
