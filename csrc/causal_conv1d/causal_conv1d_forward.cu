// causal_conv1d, forward (see causal_conv1d.h for the equation).
//
// A warp takes 128 neighbouring channels and a run of tokens, a thread 4 of them with the window in
// registers. The loads of kBatch tokens are in flight together; a batch inside one sequence looks
// at nothing but its inputs. Grid: (tiles of channels, the fastest, times kWarps runs). No shared
// memory. Bound by memory: x once (and w - 1 tokens of a run once more, from L2), y once. Final
// states: a kernel of their own, one element a thread.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kBlocksPerSm = 10;   // 96 registers a thread
constexpr int kEnoughTokens = 64;  // a run reads w - 1 tokens twice

template <class T, int kWidth, int kVec, bool kSilu>
__global__ void MAMBA2_LAUNCH_BOUNDS(kRunThreads, kBlocksPerSm)
    conv_forward(MAMBA2_GRID_CONSTANT const ForwardParams params, const Places places,
                 const Runs runs) {
  using U = accumulator_t<T>;
  const Inputs& in = params.in;
  const RunOfBlock at(in.shape, kVec, runs);
  if (at.i_d >= in.shape.d) return;
  // The block's row: what is added to find a token is the same for all threads.
  const T* g_x = static_cast<const T*>(in.x.ptr) + at.row * in.x.b;
  T* g_y = static_cast<T*>(params.y.ptr) + at.row * params.y.b;
  // The batch at `begin` sets out, if it is of one sequence that begins before it.
  Batch<T, kVec> ahead;
  const auto load_ahead = [&](int begin) {
    const int before = begin > at.first;  // the window at a run's beginning is right already
    const bool whole =
        begin + kBatch<T> <= at.last && places.at(at.row, begin).holds(begin, before, kBatch<T>);
    if (whole) ahead.load(g_x + begin * in.x.l, in.x.l, at.i_d);
    return whole;
  };
  bool whole = load_ahead(at.first);
  Taps<U, kWidth, kVec> taps;
  taps.load(in.weight, in.bias, at.i_d);
  Window<U, kWidth, kVec> window;
  window.start(in, g_x + at.i_d, at.first, places.at(at.row, at.first), at.i_d);

  T* g_y_t = g_y + at.first * params.y.l;  // of the next token
  const auto convolve = [&](const Packed<T, kVec>& packed, bool nowhere) {
    U x[kVec], y[kVec];
    packed.unpack(x);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) y[c] = nowhere ? U(0) : window.convolve(taps, x[c], c);
    if (kSilu) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) y[c] = fast::silu(y[c]);
    }
    store_vector(g_y_t + at.i_d, y);
    g_y_t += params.y.l;
    window.push(x);
  };
  MAMBA2_NO_UNROLL
  for (int begin = at.first; begin < at.last; begin += kBatch<T>) {
    if (whole) {
      const Batch<T, kVec> batch = ahead;
      whole = load_ahead(begin + kBatch<T>);
      MAMBA2_UNROLL
      for (int j = 0; j < kBatch<T>; ++j) convolve(batch.token[j], false);
      continue;
    }
    MAMBA2_NO_UNROLL
    for (int t = begin; t < begin + kBatch<T> && t < at.last; ++t) {
      Packed<T, kVec> packed;
      packed.load(g_x + t * in.x.l + at.i_d);
      const Place place = places.at(at.row, t);
      if (places.table && t == place.begin) window.start(in, g_x + at.i_d, t, place, at.i_d);
      convolve(packed, place.i_seq < 0);
    }
    whole = load_ahead(begin + kBatch<T>);
  }
}

// Grid: threads over (sequence, w - 1, d).
template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kRunThreads, 4)
    conv_final_states(MAMBA2_GRID_CONSTANT const ForwardParams params, const Places places) {
  const Inputs& in = params.in;
  const int before = in.shape.w - 1;
  const int64_t i = int64_t(blockIdx.x) * kRunThreads + threadIdx.x;
  const int i_d = static_cast<int>(i % in.shape.d), k = static_cast<int>(i / in.shape.d % before);
  const int64_t i_seq = i / in.shape.d / before;
  if (i_seq >= in.shape.nseq) return;
  const Place place = places.of(static_cast<int>(i_seq));
  const int t = place.end - before + k;
  T v = convert<T>(0.f);
  if (t >= place.begin) {
    const int64_t row = in.shape.packed ? 0 : i_seq;
    v = static_cast<const T*>(in.x.ptr)[row * in.x.b + t * in.x.l + i_d];
  } else if (in.initial_states) {
    const int64_t state = i_seq * before + t - place.begin + before;
    v = static_cast<const T*>(in.initial_states)[state * in.shape.d + i_d];
  }
  static_cast<T*>(params.final_states)[i] = v;
}

template <class T>
int run_forward(const ForwardParams& params, const Places& places, void* stream) {
  const Shape& shape = params.in.shape;
  LaunchShape at;
  at.threads = kRunThreads;
  const int error = with_width<T>(
      shape.w, in_vectors(shape.d, params.in.dtype), [&](auto, auto width, auto channels) {
        const Runs runs(shape, channels(), kBlocksPerSm, kEnoughTokens);
        at.grid = runs.grid();
        const auto kernel = params.in.silu ? conv_forward<T, width(), channels(), true>
                                           : conv_forward<T, width(), channels(), false>;
        return launch(kernel, at, stream, params, places, runs);
      });
  if (error || !params.final_states) return error;
  const int64_t elements = shape.nseq * (shape.w - 1) * shape.d;
  at.grid = dim3(static_cast<unsigned>(ceil_div(elements, kRunThreads)));
  return launch(conv_final_states<T>, at, stream, params, places);
}

}  // namespace

std::size_t forward_workspace_bytes(const Shape& shape) { return places_bytes(shape); }

int forward(const ForwardParams& params, void* workspace, void* stream) {
  Places places;
  if (const int error = make_places(params.in, workspace, &places, stream)) return error;
  return with_type(params.in.dtype, [&](auto tag) {
    return run_forward<typename decltype(tag)::type>(params, places, stream);
  });
}

}  // namespace mamba2::causal_conv1d
