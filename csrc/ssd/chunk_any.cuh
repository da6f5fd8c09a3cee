// What the kernels of tier any share: a chunk of 64 tokens of one head, its step sizes and decays.
// Decays are products of exp(delta A), never exponentials of differences of sums: whatever A and
// delta are, nothing cancels. The products are fp64 and rounded once, also where the rest is fp32:
// a decay close to 1 rounded to fp32 is off by up to 2^-25, and where all tokens' decays are equal
// the product of m of them by m times that.
#pragma once
#include "chunks.cuh"
#include "formulas.cuh"
#include "matmul_any.cuh"
#include "params.h"

namespace mamba2::ssd::any {

constexpr int kChunk = kTile;  // q: one tile holds the scores of a chunk

// The rows of one head (or group) of a (b, l, h, p)-like tensor that belong to a chunk.
template <class T>
MAMBA2_DEVICE Rows<T> rows_of(const Strided& x, const Chunk& chunk, int i_h, int width) {
  const int64_t offset = chunk.row * x.b + chunk.token * x.l + i_h * x.h;
  return {static_cast<const T*>(x.ptr) + offset, x.l, chunk.count, width};
}
template <class T>
MAMBA2_DEVICE T* first_of(const StridedOut& y, const Chunk& chunk, int i_h) {
  return static_cast<T*>(y.ptr) + (chunk.row * y.b + chunk.token * y.l + i_h * y.h);
}
// One (p, n) state of an array of them.
template <class U>
MAMBA2_DEVICE Rows<U> state_of(const U* states, int64_t i, const Shape& s) {
  return {states + i * s.p * s.n, s.n, s.p, s.n};
}

// The gradient of the output before the gate: dy silu(z), or dy where there is no gate.
template <class T>
struct Upstream {
  using U = accumulator_t<T>;
  static constexpr bool k_contiguous = true;
  Rows<T> dy, z;
  MAMBA2_DEVICE U operator()(int i, int k) const {
    const U v = dy(i, k);
    return z.first ? v * silu(z(i, k)) : v;
  }
  MAMBA2_DEVICE Upstream from_column(int k) const {
    return {dy.from_column(k), z.first ? z.from_column(k) : z};
  }
};
template <class T>
MAMBA2_DEVICE Upstream<T> upstream_of(const Strided& dy, const Inputs& in, const Chunk& chunk,
                                      int i_h) {
  return {rows_of<T>(dy, chunk, i_h, in.shape.p),
          in.z ? rows_of<T>(in.z, chunk, i_h, in.shape.p) : Rows<T>{}};
}

// Step sizes and decays of a chunk's tokens; tokens beyond its end have delta 0 and decay 1.
template <class U>
struct Decays {
  U delta[kChunk];
  U slope[kChunk];       // d delta / d dt
  double decay[kChunk];  // exp(delta A); 0 where a new run of seq_idx starts
  U from_start[kChunk];  // product of decays up to the token: what is left of the entering state
  U to_end[kChunk];      // product of decays after the token
  U weight[kChunk];      // delta to_end: what the token adds to the leaving state
  MAMBA2_DEVICE U of_chunk() const { return from_start[kChunk - 1]; }
};

template <class U>
MAMBA2_DEVICE Delta<U> delta_at(const Inputs& in, int64_t row, int64_t token, int i_h) {
  const AnyFloat dt{in.dt.ptr, in.dt_dtype};
  const U bias = in.dt_bias ? load<U>(in.dt_bias, i_h) : U(0);
  return delta_of(load<U>(dt, row * in.dt.b + token * in.dt.l + i_h * in.dt.h), bias,
                  in.dt_softplus, U(in.dt_min), U(in.dt_max));
}

template <class U>
MAMBA2_DEVICE void load_token(Decays<U>& s, const Inputs& in, const Chunk& chunk, int i_h, int i) {
  Delta<U> delta{U(0), U(0)};
  double decay = 1;
  if (i < chunk.count) {
    const int64_t token = chunk.token + i;
    delta = delta_at<U>(in, chunk.row, token, i_h);
    const int* run = in.seq_idx ? in.seq_idx + chunk.row * in.shape.l + token : nullptr;
    const bool new_run = run && token > 0 && run[0] != run[-1];
    decay = new_run ? 0. : exp(static_cast<double>(delta.value) * load<U>(in.A, i_h));
  }
  s.delta[i] = delta.value;
  s.slope[i] = delta.gradient;
  s.decay[i] = decay;
}

// f(i) for the tokens in order; 8 loads of decays under way at a time, more would cost registers.
template <class F>
MAMBA2_DEVICE void each_token(F f) {
  MAMBA2_NO_UNROLL
  for (int i0 = 0; i0 < kChunk; i0 += 8) {
    MAMBA2_UNROLL
    for (int i = i0; i < i0 + 8; ++i) f(i);
  }
}

// Starts and ends with a barrier.
template <class U>
MAMBA2_DEVICE void load_decays(Decays<U>& s, const Inputs& in, const Chunk& chunk, int i_h) {
  __syncthreads();
  if (threadIdx.x < kChunk) load_token(s, in, chunk, i_h, threadIdx.x);
  __syncthreads();
  double product = 1;
  if (threadIdx.x == 0) {
    each_token([&](int i) { s.from_start[i] = U(product *= s.decay[i]); });
  }
  if (threadIdx.x == 32) {
    each_token([&](int before_end) {
      const int i = kChunk - 1 - before_end;
      s.to_end[i] = U(product);
      s.weight[i] = U(product * s.delta[i]);
      product *= s.decay[i];
    });
  }
  __syncthreads();
}

// L_ij: what is left at token i of what was written at token j <= i; 0 above the diagonal.
template <class U>
MAMBA2_DEVICE void fill_mask(U (&s_L)[kTile][kTile + 1], const Decays<U>& s) {
  const int j = threadIdx.x;
  if (j >= kChunk) return;
  double product = 1;
  each_token([&](int i) {
    if (i > j) product *= s.decay[i];
    s_L[i][j] = i >= j ? U(product) : U(0);
  });
}

// D of a head's channel.
template <class U>
MAMBA2_DEVICE U skip_weight(const Inputs& in, int i_h, int i_p) {
  if (!in.D) return U(0);
  return load<U>(in.D, in.D_per_channel ? int64_t(i_h) * in.shape.p + i_p : i_h);
}

}  // namespace mamba2::ssd::any
