// The gradients of one chunk and head on the CPU, step by step. A segment's state (no C, no y) uses
// the steps that concern the state alone.
#pragma once
#include <algorithm>
#include <vector>

#include "chunk_cpu.h"

namespace mamba2::ssd::cpu {

// S: state entering the chunk; G: gradient of the state leaving it. W, P, V are weights between
// tokens j <= i, kept with row j and column i, and 0 elsewhere:
//   W = L_ij (C_i . B_j)    P = L_ij (dy_i . x_j)    V = W (dy_i . x_j)
// L, entering, leaving, total: decays (chunk_cpu.h).
template <class T>
struct BackwardTiles {
  int p, n;
  Decays<T> decays;
  OwnTile<T> x, dy, z, dz, dx;    // (q, p)
  OwnTile<T> scaled;              // (q, p or n): rows of another tile times a factor each
  OwnTile<T> B, C, dB, dC;        // (q, n)
  OwnTile<T> C_t, dy_t;           // (n, q), (p, q)
  OwnTile<T> W, P, V;             // (q, q)
  OwnTile<T> S, G, across;        // (p, n) and its transpose: whichever is at hand
  T direct[kChunk];               // F_j / delta_j: <G, what of S' came from token j>, before delta
  T entering_terms[kChunk] = {};  // E_i: dy_i . (what of y_i came from S)

  explicit BackwardTiles(const Shape& s)
      : p(s.p),
        n(s.n),
        x(kChunk, p),
        dy(kChunk, p),
        z(kChunk, p),
        dz(kChunk, p),
        dx(kChunk, p),
        scaled(kChunk, std::max(p, n)),
        B(kChunk, n),
        C(kChunk, n),
        dB(kChunk, n),
        dC(kChunk, n),
        C_t(n, kChunk),
        dy_t(p, kChunk),
        W(kChunk, kChunk),
        P(kChunk, kChunk),
        V(kChunk, kChunk),
        S(p, n),
        G(p, n),
        across(n, p) {}
};

// What one head of one sequence adds up over its chunks; in fp64, whatever T.
struct HeadSums {
  double dA = 0, d_dt_bias = 0;
  std::vector<double> dD;  // 1, or p
};

// W, and the decays L in P's place.
template <class T>
void score_weights(BackwardTiles<T>& t) {
  const int count = t.decays.count;
  transpose(t.C, count, t.n, t.C_t);
  matmul(t.W, t.B, t.C_t, {count, count, t.n}, T(0));
  decays_between(t.decays, t.P);
  for (int j = 0; j < count; ++j) {
    T *W = t.W.row(j), *L = t.P.row(j);
    for (int i = 0; i < count; ++i) W[i] = i < j ? T(0) : W[i] * L[i];
  }
}

// y = entering_i S C_i + sum_j W_ij delta_j x_j + D x_i, then dz = dy y silu'(z) and dy = dy
// silu(z).
template <class T>
void gate_backward(const Inputs& in, const Head<T>& head, BackwardTiles<T>& t) {
  const int count = t.decays.count;
  const OwnTile<T>& y = t.dz;
  transpose(t.S, t.p, t.n, t.across);
  matmul(y, t.C, t.across, {count, t.p, t.n}, T(0));
  scale_rows(y, count, t.p, y, [&](int i) { return t.decays.entering[i]; });
  scale_rows(t.x, count, t.p, t.scaled, [&](int j) { return t.decays.delta[j]; });
  matmul(y, transposed(t.W), t.scaled, {count, t.p, count}, T(1));
  add_skip(in, head, count, t.x, y);
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < t.p; ++k) {
      const T z = t.z.row(i)[k], dy = t.dy.row(i)[k];
      t.dz.row(i)[k] = dy * y.row(i)[k] * silu_gradient(z);
      t.dy.row(i)[k] = dy * silu(z);
    }
  }
}

// P and V, from x and the gradient of the ungated output.
template <class T>
void gradient_weights(BackwardTiles<T>& t) {
  const int count = t.decays.count;
  transpose(t.dy, count, t.p, t.dy_t);
  matmul(t.V, t.x, t.dy_t, {count, count, t.p}, T(0));
  for (int j = 0; j < count; ++j) {
    T *W = t.W.row(j), *P = t.P.row(j), *V = t.V.row(j);
    for (int i = 0; i < count; ++i) {
      const T product = i < j ? T(0) : V[i];
      P[i] *= product;
      V[i] = W[i] * product;
    }
  }
}

// dx_j = delta_j (leaving_j G B_j + sum_i W_ij dy_i) + D dy_j
template <class T>
void gradient_x(const Inputs& in, const Head<T>& head, BackwardTiles<T>& t, HeadSums& sums) {
  const int count = t.decays.count;
  const Decays<T>& d = t.decays;
  transpose(t.G, t.p, t.n, t.across);
  matmul(t.dx, t.B, t.across, {count, t.p, t.n}, T(0));
  scale_rows(t.dx, count, t.p, t.dx, [&](int j) { return d.leaving[j]; });
  for (int j = 0; j < count; ++j) t.direct[j] = dot(t.x.row(j), t.dx.row(j), t.p);
  if (in.C) matmul(t.dx, t.W, t.dy, {count, t.p, count}, T(1));
  scale_rows(t.dx, count, t.p, t.dx, [&](int j) { return d.delta[j]; });
  if (!in.D) return;
  add_skip(in, head, count, t.dy, t.dx);
  for (int j = 0; j < count; ++j) {
    if (!in.D_per_channel) sums.dD[0] += dot(t.dy.row(j), t.x.row(j), t.p);
    for (int k = 0; in.D_per_channel && k < t.p; ++k) {
      sums.dD[k] += static_cast<double>(t.dy.row(j)[k]) * t.x.row(j)[k];
    }
  }
}

// dB_j = delta_j (leaving_j G^T x_j + sum_i P_ij C_i), this head's part
template <class T>
void gradient_B(const Inputs& in, BackwardTiles<T>& t) {
  const int count = t.decays.count;
  matmul(t.dB, t.x, t.G, {count, t.n, t.p}, T(0));
  scale_rows(t.dB, count, t.n, t.dB, [&](int j) { return t.decays.leaving[j]; });
  if (in.C) matmul(t.dB, t.P, t.C, {count, t.n, count}, T(1));
  scale_rows(t.dB, count, t.n, t.dB, [&](int j) { return t.decays.delta[j]; });
}

// dC_i = entering_i S^T dy_i + sum_j P_ij delta_j B_j, this head's part
template <class T>
void gradient_C(BackwardTiles<T>& t) {
  const int count = t.decays.count;
  matmul(t.dC, t.dy, t.S, {count, t.n, t.p}, T(0));
  scale_rows(t.dC, count, t.n, t.dC, [&](int i) { return t.decays.entering[i]; });
  for (int i = 0; i < count; ++i) t.entering_terms[i] = dot(t.C.row(i), t.dC.row(i), t.n);
  scale_rows(t.B, count, t.n, t.scaled, [&](int j) { return t.decays.delta[j]; });
  matmul(t.dC, transposed(t.P), t.scaled, {count, t.n, count}, T(1));
}

// K: <G, what of S' came from S>
template <class T>
T state_term(const BackwardTiles<T>& t) {
  T sum = 0;
  for (int i = 0; i < t.p; ++i) sum += dot(t.G.row(i), t.S.row(i), t.n);
  return t.decays.total * sum;
}

// d(delta_t A) = sum_{j < t <= i} V_ij delta_j + sum_{i >= t} E_i + sum_{j < t} F_j + K:
// everything whose decay runs through token t. The first sum is formed term by term: as a
// difference of row and column sums it would cancel.
template <class T>
void gradient_dt(const Head<T>& head, BackwardTiles<T>& t, T d_log_decay, HeadSums& sums, T* d_dt) {
  const Decays<T>& d = t.decays;
  const int count = d.count;
  T d_a[kChunk];
  T entering = 0;
  for (int i = count - 1; i >= 0; --i) d_a[i] = entering += t.entering_terms[i];
  T from_before[kChunk] = {};  // sum_{j < t} V_ij delta_j, for each i
  T leaving = state_term(t);
  for (int i_t = 0; i_t < count; ++i_t) {
    T within = 0;
    for (int i = i_t; i < count; ++i) within += from_before[i];
    d_a[i_t] += within + leaving;
    for (int i = i_t; i < count; ++i) from_before[i] += t.V.row(i_t)[i] * d.delta[i_t];
    leaving += t.direct[i_t] * d.delta[i_t];
  }
  for (int i_t = 0; i_t < count; ++i_t) {
    T d_delta = t.direct[i_t];
    for (int i = i_t; i < count; ++i) d_delta += t.V.row(i_t)[i];
    const T d_log = (d.constant[i_t] ? T(0) : d_a[i_t]) + d_log_decay;
    d_dt[i_t] = (d_delta + head.A * d_log) * d.slope[i_t];
    sums.dA += static_cast<double>(d.delta[i_t]) * d_log;
    sums.d_dt_bias += d_dt[i_t];
  }
}

// G = total G + sum_i entering_i dy_i C_i^T
template <class T>
void gradient_state(const Inputs& in, BackwardTiles<T>& t) {
  const int count = t.decays.count;
  scale_rows(t.dy, count, t.p, t.scaled, [&](int i) { return t.decays.entering[i]; });
  matmul(t.G, transposed(t.scaled), t.C, {t.p, t.n, in.C ? count : 0}, t.decays.total);
}

}  // namespace mamba2::ssd::cpu
