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
    Packed<T, kVec> packed[kWidth - 1];
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth - 1; ++k) {
      const int at = t - (kWidth - 1) + k, state = at - place.begin + kWidth - 1;
      packed[k].zero();
      if (place.i_seq >= 0 && at >= place.begin) {
        packed[k].load(g_x + at * in.x.l);
      } else if (place.i_seq >= 0 && in.initial_states) {
        const int64_t row = int64_t(place.i_seq) * (kWidth - 1) + state;
        packed[k].load(static_cast<const T*>(in.initial_states) + row * in.shape.d + i_d);
      }
    }
    MAMBA2_UNROLL
    for (int k = 0; k < kWidth - 1; ++k) packed[k].unpack(x[k]);
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

// ---- who has what: a block takes a tile of channels and a run of tokens of a row ----
constexpr int kRunThreads = 64;
// Tokens whose loads are in flight together: 8 bytes a token of 16-bit channels.
template <class T>
constexpr int kBatch = sizeof(T) == 2 ? 8 : 4;
constexpr int kLongestBatch = 8;
constexpr int kSms = 132;  // of an H100 or H200, whatever the card: results must not depend on it

// A run's tokens: so many that `blocks_per_sm` blocks on every SM do all the work at once, but
// `enough` where that leaves four times as many blocks or more. And the grid: tiles the fastest,
// then the runs of a row, then rows.
struct Runs {
  int tiles, length, of_row;
  int64_t count;  // of all rows

  Runs(const Shape& shape, int channels, int blocks_per_sm, int enough)
      : tiles(ceil_div(shape.d, kRunThreads * channels)) {
    const int64_t wanted = kSms * blocks_per_sm / tiles / shape.b;  // of a row
    length = static_cast<int>(
        round_up(ceil_div(shape.l, wanted > 0 ? wanted : 1), int64_t(kLongestBatch)));
    if (length >= 4 * enough) length = enough;
    of_row = static_cast<int>(ceil_div(shape.l, int64_t(length)));
    count = shape.b * of_row;
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(count * tiles)); }
};

struct RunOfBlock {
  int i_run, row, first, last;
  int i_d;  // the thread's first channel

  MAMBA2_DEVICE RunOfBlock(const Shape& shape, int channels, const Runs& runs)
      : i_run(static_cast<int>(blockIdx.x) / runs.tiles),
        row(i_run / runs.of_row),
        first(i_run % runs.of_row * runs.length) {
    const int l = static_cast<int>(shape.l), tile = static_cast<int>(blockIdx.x) % runs.tiles;
    last = first + runs.length < l ? first + runs.length : l;
    i_d = (tile * kRunThreads + static_cast<int>(threadIdx.x)) * channels;
  }
};

// Neighbouring tokens, `stride` elements apart.
template <class T, int kVec>
struct Batch {
  Packed<T, kVec> token[kBatch<T>];

  MAMBA2_DEVICE void load(const T* from, int64_t stride, int i_d) {
    MAMBA2_UNROLL
    for (int j = 0; j < kBatch<T>; ++j, from += stride) token[j].load(from + i_d);
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
