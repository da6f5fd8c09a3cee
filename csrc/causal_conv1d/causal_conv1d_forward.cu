// causal_conv1d, forward (see causal_conv1d.h for the equation).
//
// A thread takes 16 bytes of channels and a run of tokens, the window in registers; neighbouring
// threads have neighbouring channels. The loads of kBatch tokens are in flight together.
// Grid: threads over (row, run, channels), channels the fastest. No shared memory.
// Bound by memory: x once (and w - 1 tokens of a run once more, from L2), y once.
// Final states: a kernel of their own, one element a thread.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "causal_conv1d.cuh"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 4;
// Long runs read less twice; short ones fill the card when there are few tokens.
constexpr int kLongRun = 32, kShortRun = 8;
constexpr int64_t kThreadsForLongRuns = 1 << 17;

template <class T, int kWidth, int kVec>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    conv_forward(MAMBA2_GRID_CONSTANT const ForwardParams params, const Places places, int run) {
  using U = accumulator_t<T>;
  const Inputs& in = params.in;
  const int vectors = in.shape.d / kVec, l = static_cast<int>(in.shape.l);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int i_d = static_cast<int>(i % vectors) * kVec, runs = ceil_div(l, run);
  const int row = static_cast<int>(i / vectors / runs);
  if (row >= in.shape.b) return;
  const int first = static_cast<int>(i / vectors % runs) * run;
  const int last = first + run < l ? first + run : l;
  const T* g_x = static_cast<const T*>(in.x.ptr) + row * in.x.b + i_d;
  T* g_y = static_cast<T*>(params.y.ptr) + row * params.y.b + i_d;

  Taps<U, kWidth, kVec> taps;
  taps.load(in.weight, in.bias, i_d);
  Window<U, kWidth, kVec> window;
  window.start(in, g_x, first, places.at(row, first), i_d);
  MAMBA2_NO_UNROLL
  for (int begin = first; begin < last; begin += kBatch) {
    Packed<T, kVec> packed[kBatch];
    MAMBA2_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      packed[j].zero();
      if (begin + j < last) packed[j].load(g_x + (begin + j) * in.x.l);
    }
    MAMBA2_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const int t = begin + j;
      if (t >= last) break;
      const Place place = places.at(row, t);
      if (places.table && t == place.begin) window.start(in, g_x, t, place, i_d);
      U x[kVec], y[kVec];
      packed[j].unpack(x);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) {
        y[c] = window.convolve(taps, x[c], c);
        if (in.silu) y[c] = fast::silu(y[c]);
        if (place.i_seq < 0) y[c] = 0;
      }
      store_vector(g_y + t * params.y.l, y);
      window.push(x);
    }
  }
}

// Grid: threads over (sequence, w - 1, d).
template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    conv_final_states(MAMBA2_GRID_CONSTANT const ForwardParams params, const Places places) {
  const Inputs& in = params.in;
  const int before = in.shape.w - 1;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
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
  at.threads = kThreads;
  const auto blocks = [](int64_t threads) {
    return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)));
  };
  const int error = with_width<T>(
      shape.w, in_vectors(shape.d, params.in.dtype), [&](auto, auto width, auto channels) {
        const auto threads = [&](int run) {
          return shape.b * ceil_div(shape.l, run) * (shape.d / channels());
        };
        const int run = threads(kLongRun) >= kThreadsForLongRuns ? kLongRun : kShortRun;
        at.grid = blocks(threads(run));
        return launch(conv_forward<T, width(), channels()>, at, stream, params, places, run);
      });
  if (error || !params.final_states) return error;
  at.grid = blocks(shape.nseq * (shape.w - 1) * shape.d);
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
