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

  template <class From>
  MAMBA2_DEVICE void load_as(const AnyFloat& g_weight, int64_t i_d) {
    const From* from = static_cast<const From*>(g_weight.ptr) + i_d * kWidth;
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) {
      MAMBA2_UNROLL
      for (int k = 0; k < kWidth; ++k) weight[k][c] = convert<U>(from[c * kWidth + k]);
    }
  }
  MAMBA2_DEVICE void load(const AnyFloat& g_weight, const AnyFloat& g_bias, int64_t i_d) {
    if (g_weight.dtype == DType::f32) {
      load_as<float>(g_weight, i_d);
    } else if (g_weight.dtype == DType::bf16) {
      load_as<bf16>(g_weight, i_d);
    } else if (g_weight.dtype == DType::f16) {
      load_as<f16>(g_weight, i_d);
    } else {
      load_as<double>(g_weight, i_d);
    }
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) bias[c] = g_bias ? mamba2::load<U>(g_bias, i_d + c) : U(0);
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

// Channels a thread takes: 16 bytes of them where every row begins at a multiple of 16 bytes.
inline bool in_vectors(int d, DType dtype) {
  return dtype != DType::f64 && int64_t(d) * int64_t(size_of(dtype)) % kVectorBytes == 0;
}

// f(TypeTag<T>{}, width, channels) with compile-time width and channels of a thread.
template <class T, class F>
int with_width(int w, bool vectors, F f) {
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  const auto run = [&](auto width) {
    if constexpr (sizeof(T) < 8) {
      if (vectors) return f(TypeTag<T>{}, width, std::integral_constant<int, kVec>{});
    }
    return f(TypeTag<T>{}, width, std::integral_constant<int, 1>{});
  };
  if (w == 2) return run(std::integral_constant<int, 2>{});
  if (w == 3) return run(std::integral_constant<int, 3>{});
  return run(std::integral_constant<int, 4>{});
}

}  // namespace mamba2::causal_conv1d
