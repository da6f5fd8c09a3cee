// Forward on the CPU: for each head of each sequence, chunk after chunk,
//   y_i = entering_i S C_i + sum_{j<=i} L_ij delta_j (C_i . B_j) x_j + D x_i    chunk_scan
//   S'  = total S + sum_j leaving_j delta_j x_j B_j^T                           chunk_state
// with S the state entering the chunk; L, entering, leaving and total: decays (chunk_cpu.h).
// Tasks: heads of sequences.
#include "../core/parallel_cpu.h"
#include "chunk_cpu.h"
#include "ssd_scan_cpu.h"

namespace mamba2::ssd::cpu {
namespace {

template <class T>
struct ForwardTiles {
  int p, n;
  Decays<T> decays;
  OwnTile<T> x, z, y, weighted_x;  // (q, p)
  OwnTile<T> B, C;                 // (q, n)
  OwnTile<T> C_t;                  // (n, q)
  OwnTile<T> weights_t, L;         // (q, q): row j, column i
  OwnTile<T> state_t;              // (n, p)
  OwnTile<T> state;                // (p, n)

  explicit ForwardTiles(const Shape& s)
      : p(s.p),
        n(s.n),
        x(kChunk, p),
        z(kChunk, p),
        y(kChunk, p),
        weighted_x(kChunk, p),
        B(kChunk, n),
        C(kChunk, n),
        C_t(n, kChunk),
        weights_t(kChunk, kChunk),
        L(kChunk, kChunk),
        state_t(n, p),
        state(p, n) {}
};

// weights_t(j, i) = decay from j to i * delta_j * (C_i . B_j) for i >= j, else 0.
template <class T>
void score_weights(ForwardTiles<T>& t) {
  const int count = t.decays.count;
  transpose(t.C, count, t.n, t.C_t);
  matmul(t.weights_t, t.B, t.C_t, {count, count, t.n}, T(0));
  decays_between(t.decays, t.L);
  for (int j = 0; j < count; ++j) {
    T *weight = t.weights_t.row(j), *L = t.L.row(j);
    for (int i = 0; i < count; ++i) {
      weight[i] = i < j ? T(0) : weight[i] * L[i] * t.decays.delta[j];
    }
  }
}

template <class T>
void chunk_scan(const ForwardParams& params, const Head<T>& head, ForwardTiles<T>& t) {
  const Inputs& in = params.in;
  const int count = t.decays.count;
  matmul(t.y, t.C, t.state_t, {count, t.p, t.n}, T(0));
  scale_rows(t.y, count, t.p, t.y, [&](int i) { return t.decays.entering[i]; });
  score_weights(t);
  matmul(t.y, transposed(t.weights_t), t.x, {count, t.p, count}, T(1));
  add_skip(in, head, count, t.x, t.y);
  if (!in.z) return;
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < t.p; ++k) t.y.row(i)[k] *= silu(t.z.row(i)[k]);
  }
}

template <class T>
void chunk_state(ForwardTiles<T>& t) {
  const int count = t.decays.count;
  scale_rows(t.x, count, t.p, t.weighted_x,
             [&](int j) { return t.decays.leaving[j] * t.decays.delta[j]; });
  matmul(t.state_t, transposed(t.B), t.weighted_x, {t.n, t.p, count}, t.decays.total);
}

template <class T>
void forward_head(const ForwardParams& params, const Sequence& sequence, int64_t i_seq, int i_h,
                  ForwardTiles<T>& t) {
  const Inputs& in = params.in;
  const Head<T> head(in, i_h);
  const int64_t state_at = (i_seq * in.shape.h + i_h) * t.p * t.n;
  load_initial_state(in, state_at, t.state);
  transpose(t.state, t.p, t.n, t.state_t);
  double log_decay = 0;
  for (int64_t i_c = 0; i_c < sequence.chunks(); ++i_c) {
    chunk_cumsum(in, head, sequence, i_c, t.decays);
    load_chunk(in.x, in.dtype, sequence, i_c, i_h, t.p, t.x);
    load_chunk(in.B, in.dtype, sequence, i_c, head.i_g, t.n, t.B);
    if (params.y) {
      load_chunk(in.C, in.dtype, sequence, i_c, head.i_g, t.n, t.C);
      if (in.z) load_chunk(in.z, in.dtype, sequence, i_c, i_h, t.p, t.z);
      chunk_scan(params, head, t);
      store_chunk(t.y, params.y, in.dtype, sequence, i_c, i_h, t.p);
    }
    chunk_state(t);
    for (int i = 0; i < t.decays.count; ++i) log_decay += double(t.decays.delta[i]) * head.A;
  }
  if (params.final_states) {
    transpose(t.state_t, t.n, t.p, t.state);
    store_rows(kStateDType<T>, static_cast<T*>(params.final_states) + state_at, t.n, t.p, t.n,
               t.state.row(0), t.state.stride());
  }
  if (params.log_decay) {
    static_cast<T*>(params.log_decay)[i_seq * in.shape.h + i_h] = static_cast<T>(log_decay);
  }
}

template <class T>
void forward_as(const ForwardParams& params) {
  const Shape& shape = params.in.shape;
  const auto sequences = sequences_of(params.in);
  if (params.y && shape.packed) {
    zero_uncovered(params.y, params.in.dtype, shape, covered_by(sequences, shape), shape.h,
                   shape.p);
  }
  parallel_tasks(
      shape.nseq * shape.h, [&] { return ForwardTiles<T>(shape); },
      [&](int64_t task, ForwardTiles<T>& tiles) {
        const int64_t i_seq = task / shape.h;
        forward_head(params, sequences[i_seq], i_seq, static_cast<int>(task % shape.h), tiles);
      });
}

}  // namespace

void forward(const ForwardParams& params) {
  params.in.dtype == DType::f64 ? forward_as<double>(params) : forward_as<float>(params);
}

}  // namespace mamba2::ssd::cpu
