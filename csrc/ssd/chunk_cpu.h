// A chunk of one head on the CPU: its decays, and its rows of x, B, C as tiles.
//
// The CPU runs the block form with short chunks, so that the work on pairs of tokens stays below
// the work on the state. Every decay between two tokens is the sum of the log decays between them,
// in fp64: no difference of longer sums, so nothing cancels whatever the decays were.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/matmul_cpu.h"
#include "formulas.cuh"
#include "params.h"

namespace mamba2::ssd::cpu {

using namespace mamba2::cpu;  // tiles, rows, tasks: csrc/core/*_cpu.h

constexpr int kChunk = 32;  // q: two fp32 vectors of 512 bits, or a multiple of any narrower one

// What a state runs through: tokens first .. first + count of one row.
struct Sequence {
  int64_t row = 0, first = 0, count = 0;
  int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
  int tokens_in(int64_t i_c) const {
    return static_cast<int>(std::min<int64_t>(kChunk, count - i_c * kChunk));
  }
};
// The sequences of a call: the rows, or what cu_seqlens says, clamped to [0, l] and made monotone.
std::vector<Sequence> sequences_of(const Inputs& in);
// Tokens [begin, end) of every row belong to some sequence.
struct Covered {
  int64_t begin, end;
};
Covered covered_by(const std::vector<Sequence>& sequences, const Shape& shape);

// One head of the operator: its scalars, and the group of B and C that it reads.
template <class T>
struct Head {
  int i_h, i_g;
  T A, dt_bias;
  Head(const Inputs& in, int i_h)
      : i_h(i_h),
        i_g(i_h / in.shape.heads_per_group()),
        A(load<T>(in.A, i_h)),
        dt_bias(in.dt_bias ? load<T>(in.dt_bias, i_h) : T(0)) {}
};

// Stage chunk_cumsum: step sizes and decays of a chunk's tokens, and what follows from them.
template <class T>
struct Decays {
  int count;
  T delta[kChunk];
  T slope[kChunk];        // d delta / d dt
  bool constant[kChunk];  // the decay does not depend on delta: clamped, or a reset
  double a_log2[kChunk];  // of token i alone
  T entering[kChunk];     // what is left at token i of the state entering the chunk
  T leaving[kChunk];      // what is left of token j at the end of the chunk
  T total;                // what is left of the state entering the chunk at its end
};
template <class T>
void chunk_cumsum(const Inputs& in, const Head<T>& head, const Sequence& sequence, int64_t i_c,
                  Decays<T>& out);

// What T is called at run time: the dtype of states and of the gradients of parameters.
template <class T>
constexpr DType kStateDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// A tile that owns its memory: rows padded as matmul wants them, 64-byte aligned.
template <class T>
class OwnTile {
 public:
  OwnTile(int rows, int columns)
      : stride_(padded(columns)), storage_(static_cast<std::size_t>(rows) * stride_ + 64, T(0)) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    data_ = storage_.data() + (64 - address % 64) % 64 / sizeof(T);
  }
  OwnTile(OwnTile&&) = default;
  operator Tile<T>() const { return {data_, stride_}; }
  T* row(int i) const { return data_ + static_cast<long>(i) * stride_; }
  int stride() const { return stride_; }

 private:
  int stride_;
  std::vector<T> storage_;
  T* data_;
};
template <class T>
Left<T> transposed(const OwnTile<T>& t) {
  return mamba2::cpu::transposed(static_cast<Tile<T>>(t));
}
template <class T>
void matmul(const OwnTile<T>& out, Left<T> a, const OwnTile<T>& b, Extent extent, T keep) {
  mamba2::cpu::matmul<T>(out, a, b, extent, keep);
}
template <class T>
void matmul(const OwnTile<T>& out, const OwnTile<T>& a, const OwnTile<T>& b, Extent extent,
            T keep) {
  mamba2::cpu::matmul<T>(out, static_cast<Tile<T>>(a), b, extent, keep);
}

// to (columns, rows) = from (rows, columns) transposed.
template <class T>
void transpose(const OwnTile<T>& from, int rows, int columns, const OwnTile<T>& to) {
  constexpr int side = 8;
  for (int i0 = 0; i0 < rows; i0 += side) {
    const int i1 = std::min(i0 + side, rows);
    for (int k = 0; k < columns; ++k) {
      for (int i = i0; i < i1; ++i) to.row(k)[i] = from.row(i)[k];
    }
  }
}

// L(j, i) = 2^(a_{j+1} + ... + a_i) for i >= j, else 0: what is left of token j at token i.
template <class T>
void decays_between(const Decays<T>& decays, const OwnTile<T>& L) {
  for (int j = 0; j < decays.count; ++j) {
    T* row = L.row(j);
    std::fill_n(row, j, T(0));
    row[j] = T(1);
    double sum = 0;
    for (int i = j + 1; i < decays.count; ++i) {
      sum += decays.a_log2[i];
      row[i] = std::exp2(static_cast<T>(sum));
    }
  }
}

// sum_k a_k b_k, in a fixed order that vectors can follow.
template <class T>
T dot(const T* a, const T* b, int count) {
  constexpr int lanes = 16;
  T sums[lanes] = {};
  int k = 0;
  for (; k + lanes <= count; k += lanes) {
    for (int i = 0; i < lanes; ++i) sums[i] += a[k + i] * b[k + i];
  }
  for (int i = 0; k + i < count; ++i) sums[i] += a[k + i] * b[k + i];
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// to_i = scale_i * from_i for each row i.
template <class T, class Scale>
void scale_rows(const OwnTile<T>& from, int rows, int columns, const OwnTile<T>& to,
                const Scale& scale) {
  for (int i = 0; i < rows; ++i) {
    const T factor = scale(i);
    const T* source = from.row(i);
    T* target = to.row(i);
    for (int k = 0; k < columns; ++k) target[k] = factor * source[k];
  }
}

// y += D x, D being one number a head or one a channel.
template <class T>
void add_skip(const Inputs& in, const Head<T>& head, int count, const OwnTile<T>& x,
              const OwnTile<T>& y) {
  if (!in.D) return;
  const int p = in.shape.p;
  T D[256];
  for (int k = 0; k < p; ++k) {
    D[k] = load<T>(in.D, in.D_per_channel ? static_cast<int64_t>(head.i_h) * p + k : head.i_h);
  }
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < p; ++k) y.row(i)[k] += D[k] * x.row(i)[k];
  }
}

// The state entering a sequence: initial_states at element `at`, or zeros.
template <class T>
void load_initial_state(const Inputs& in, int64_t at, const OwnTile<T>& state) {
  const int p = in.shape.p, n = in.shape.n;
  if (in.initial_states) {
    const auto bytes = static_cast<int64_t>(size_of(in.initial_states.dtype));
    const auto* from = static_cast<const char*>(in.initial_states.ptr) + at * bytes;
    load_rows(in.initial_states.dtype, from, n, p, n, state.row(0), state.stride());
    return;
  }
  for (int i = 0; i < p; ++i) std::fill_n(state.row(i), n, T(0));
}

// Rows of one chunk and head of a (b, l, h, .) tensor, h being the group for B and C.
template <class T>
void load_chunk(const Strided& t, DType dtype, const Sequence& sequence, int64_t i_c, int i_h,
                int columns, const OwnTile<T>& to) {
  const int64_t token = sequence.first + i_c * kChunk;
  const auto* from =
      static_cast<const char*>(t.ptr) +
      (sequence.row * t.b + token * t.l + i_h * t.h) * static_cast<int64_t>(size_of(dtype));
  load_rows(dtype, from, t.l, sequence.tokens_in(i_c), columns, to.row(0), to.stride());
}
template <class T>
void store_chunk(const OwnTile<T>& from, const StridedOut& t, DType dtype, const Sequence& sequence,
                 int64_t i_c, int i_h, int columns) {
  const int64_t token = sequence.first + i_c * kChunk;
  auto* to = static_cast<char*>(t.ptr) +
             (sequence.row * t.b + token * t.l + i_h * t.h) * static_cast<int64_t>(size_of(dtype));
  store_rows(dtype, to, t.l, sequence.tokens_in(i_c), columns, from.row(0), from.stride());
}
// Zeros at the tokens of a packed row that no sequence covers: (l, heads, columns) of them.
void zero_uncovered(const StridedOut& t, DType dtype, const Shape& shape, Covered covered,
                    int heads, int columns);

}  // namespace mamba2::ssd::cpu
