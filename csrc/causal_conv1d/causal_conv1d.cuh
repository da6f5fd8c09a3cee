// What the convolution's kernels share: where a token stands, its taps, the window before it.
#pragma once
#include "../core/dispatch.cuh"
#include "../core/vectors.cuh"
#include "causal_conv1d.h"

namespace mamba2::causal_conv1d {

// The sequence of a token, and the tokens of the row that it is.
struct Place {
  int i_seq;  // -1: the token is of no sequence
  int begin, end;

  // Of token t: the `count` tokens from t on are of one sequence, and so are the `before` before t.
  MAMBA2_DEVICE bool holds(int t, int before, int count) const {
    return i_seq >= 0 && begin <= t - before && t + count <= end;
  }
};

// How to find places. Passed by value to kernels.
struct Places {
  const int4* table = nullptr;       // packed: (l) {i_seq, begin, end, 0}
  const int* first_token = nullptr;  // packed: (nseq + 1)
  int l = 0;

  MAMBA2_DEVICE Place at(int row, int t) const {
    if (!table) return {row, 0, l};
    const int4 v = table[t];
    return {v.x, v.y, v.z};
  }
  // All of one sequence.
  MAMBA2_DEVICE Place of(int i_seq) const {
    if (!table) return {i_seq, 0, l};
    return {i_seq, first_token[i_seq], first_token[i_seq + 1]};
  }
};
std::size_t places_bytes(const Shape& shape);
// Packed: fills the table, in `memory`, from cu_seqlens. Returns a cudaError_t as int.
int make_places(const Inputs& in, void* memory, Places* out, void* stream);

template <class U, int kWidth, int kVec>
struct Taps {
  U weight[kWidth][kVec], bias[kVec];

  MAMBA2_DEVICE void load(const AnyFloat& g_weight, const AnyFloat& g_bias, int64_t i_d) {
    U of_channel[kVec * kWidth];
    load_any(g_weight, i_d * kWidth, of_channel);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      bias[c] = 0;
      MAMBA2_UNROLL
      for (int k = 0; k < kWidth; ++k) weight[k][c] = of_channel[c * kWidth + k];
    }
    if (g_bias) load_any(g_bias, i_d, bias);
  }
};

// The last kWidth - 1 inputs, the oldest first.
template <class U, int kWidth, int kVec>
struct Window {
  U x[kWidth - 1][kVec];

  // What lies before token t: inputs of its sequence, or its initial states, or zeros.
  template <class T>
  MAMBA2_DEVICE void start(const Inputs& in, const T* g_x, int t, const Place& place, int i_d) {
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth - 1; ++k) {
      const int at = t - (kWidth - 1) + k, state = at - place.begin + kWidth - 1;
      Packed<T, kVec> packed;
      packed.zero();
      if (place.i_seq >= 0 && at >= place.begin) {
        packed.load(g_x + at * in.x.l);
      } else if (place.i_seq >= 0 && in.initial_states) {
        const int64_t row = int64_t(place.i_seq) * (kWidth - 1) + state;
        packed.load(static_cast<const T*>(in.initial_states) + row * in.shape.d + i_d);
      }
      packed.unpack(x[k]);
    }
  }
  MAMBA2_DEVICE void push(const U (&newest)[kVec]) {
    MAMBA2_UNROLL
    for (int k = 0; k + 1 < kWidth - 1; ++k) {
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) x[k][c] = x[k + 1][c];
    }
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) x[kWidth - 2][c] = newest[c];
  }
  // bias + sum of taps, the newest input given.
  MAMBA2_DEVICE U convolve(const Taps<U, kWidth, kVec>& taps, U newest, int c) const {
    U sum = taps.bias[c] + taps.weight[kWidth - 1][c] * newest;
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth - 1; ++k) sum += taps.weight[k][c] * x[k][c];
    return sum;
  }
};

// ---- who has what: a warp takes 32 kVec channels and a run of tokens of a row ----
constexpr int kWarps = 4, kRunThreads = 32 * kWarps;  // of a block: neighbouring runs
constexpr int kBatch = 8;                             // tokens whose loads are in flight together
constexpr int kSms = 132;  // of an H100 or H200, whatever the card: results must not depend on it

// Tokens of a run: so many that `blocks_per_sm` blocks on every SM do all the work at once.
inline int run_length(const Shape& shape, int channels, int blocks_per_sm) {
  const int64_t warps = int64_t(kSms) * blocks_per_sm * kWarps;
  const int64_t runs = warps / (shape.b * ceil_div(shape.d, 32 * channels));  // of a row
  const int64_t run = round_up(ceil_div(shape.l, runs > 0 ? runs : 1), kBatch);
  return static_cast<int>(run);
}
inline int64_t run_blocks(const Shape& shape, int run) {
  return ceil_div(shape.b * ceil_div(shape.l, run), kWarps);
}

struct RunOfWarp {
  int block, tile;  // of runs, and of channels
  int i_d;          // the thread's first channel
  int row, first, last;

  MAMBA2_DEVICE RunOfWarp(const Shape& shape, int channels, int run) {
    const int tiles = ceil_div(shape.d, 32 * channels), l = static_cast<int>(shape.l);
    const int runs_of_row = ceil_div(l, run);
    tile = static_cast<int>(blockIdx.x) % tiles;
    block = static_cast<int>(blockIdx.x) / tiles;
    i_d = (tile * 32 + static_cast<int>(threadIdx.x) % 32) * channels;
    const int i_run = block * kWarps + static_cast<int>(threadIdx.x) / 32;
    row = i_run / runs_of_row;
    first = i_run % runs_of_row * run;
    last = first + run < l ? first + run : l;
    if (row >= shape.b || i_d >= shape.d) last = first;  // nothing
  }
};

// Neighbouring tokens, `stride` elements apart.
template <class T, int kVec>
struct Batch {
  Packed<T, kVec> token[kBatch];

  MAMBA2_DEVICE void load(const T* from, int64_t stride) {
    MAMBA2_UNROLL
    for (int j = 0; j < kBatch; ++j, from += stride) token[j].load(from);
  }
};

// Four channels a thread where every row begins at a multiple of 16 bytes: with more, the taps and
// sums of a thread leave no registers for loads in flight.
constexpr int kChannels = 4;
inline bool in_vectors(int d, DType dtype) {
  return dtype != DType::f64 && int64_t(d) * int64_t(size_of(dtype)) % kVectorBytes == 0;
}

// f(TypeTag<T>{}, width, channels) with compile-time width and channels of a thread.
template <class T, class F>
int with_width(int w, bool vectors, F f) {
  const auto run = [&](auto width) {
    if constexpr (sizeof(T) < 8) {
      if (vectors) return f(TypeTag<T>{}, width, std::integral_constant<int, kChannels>{});
    }
    return f(TypeTag<T>{}, width, std::integral_constant<int, 1>{});
  };
  if (w == 2) return run(std::integral_constant<int, 2>{});
  if (w == 3) return run(std::integral_constant<int, 3>{});
  return run(std::integral_constant<int, 4>{});
}

}  // namespace mamba2::causal_conv1d
