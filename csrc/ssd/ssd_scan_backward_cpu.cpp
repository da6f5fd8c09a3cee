// Backward on the CPU. For each head of each sequence: the states entering its chunks once more,
// then the chunks in reverse order with the gradient of the state (chunk_backward_cpu.h).
//
// Tasks: a slice of the heads of one group, for one sequence. Heads of a slice add their dB and dC
// up in memory of the slice's own; slices are summed at the end, in order. The slices come from the
// number of heads alone, so a result depends neither on the threads nor on the batch.
// Memory beyond the outputs: dB and dC in fp32 once a slice, states (l / q, p, n) once a thread.
#include <memory>

#include "../core/parallel_cpu.h"
#include "chunk_backward_cpu.h"
#include "ssd_scan_cpu.h"

namespace mamba2::ssd::cpu {
namespace {

constexpr int kMaxSlices = 8;  // of a group's heads: work for eight threads at b = g = 1

int slices_of(const Shape& shape) { return std::min(shape.heads_per_group(), kMaxSlices); }

// The sums of all heads of all sequences, and dB and dC per slice: (slices, b, l, g, n).
template <class T>
struct Partial {
  std::vector<HeadSums> heads;  // (nseq, h)
  std::unique_ptr<T[]> dB, dC;
  int64_t slice_numel;

  explicit Partial(const Inputs& in)
      : heads(static_cast<std::size_t>(in.shape.nseq * in.shape.h)),
        slice_numel(in.shape.b * in.shape.l * in.shape.g * in.shape.n) {
    dB.reset(new T[slices_of(in.shape) * slice_numel]);
    if (in.C) dC.reset(new T[slices_of(in.shape) * slice_numel]);
    const int dD_numel = !in.D ? 0 : in.D_per_channel ? in.shape.p : 1;
    for (HeadSums& sums : heads) sums.dD.assign(static_cast<std::size_t>(dD_numel), 0.0);
  }
};

// One head's dB or dC of a chunk into its slice: the first head writes, the others add.
template <class T>
void accumulate(const OwnTile<T>& from, const Inputs& in, const Sequence& sequence, int64_t i_c,
                int i_g, bool first, T* slice) {
  const Shape& s = in.shape;
  for (int i = 0; i < sequence.tokens_in(i_c); ++i) {
    const int64_t token = sequence.row * s.l + sequence.first + i_c * kChunk + i;
    T* to = slice + (token * s.g + i_g) * s.n;
    const T* source = from.row(i);
    if (first) {
      std::copy_n(source, s.n, to);
    } else {
      for (int k = 0; k < s.n; ++k) to[k] += source[k];
    }
  }
}

// The states entering the chunks of one head: (chunks, p, n).
template <class T>
void states_entering(const Inputs& in, const Head<T>& head, const Sequence& sequence, int64_t i_seq,
                     BackwardTiles<T>& t, std::vector<T>& states) {
  const int64_t numel = static_cast<int64_t>(t.p) * t.n;
  states.resize(static_cast<std::size_t>(sequence.chunks() * numel));
  load_initial_state(in, (i_seq * in.shape.h + head.i_h) * numel, t.S);
  for (int64_t i_c = 0; i_c < sequence.chunks(); ++i_c) {
    store_rows(kStateDType<T>, states.data() + i_c * numel, t.n, t.p, t.n, t.S.row(0),
               t.S.stride());
    if (i_c + 1 == sequence.chunks()) break;
    const Decays<T>& d = t.decays;
    chunk_cumsum(in, head, sequence, i_c, t.decays);
    load_chunk(in.x, in.dtype, sequence, i_c, head.i_h, t.p, t.x);
    load_chunk(in.B, in.dtype, sequence, i_c, head.i_g, t.n, t.B);
    scale_rows(t.x, d.count, t.p, t.scaled, [&](int j) { return d.leaving[j] * d.delta[j]; });
    matmul(t.S, transposed(t.scaled), t.B, {t.p, t.n, d.count}, d.total);
  }
}

template <class T>
void load_state_gradient(const BackwardParams& params, int64_t at, BackwardTiles<T>& t) {
  for (int i = 0; i < t.p; ++i) std::fill_n(t.G.row(i), t.n, T(0));
  if (!params.d_final_states) return;
  load_rows(kStateDType<T>, static_cast<const T*>(params.d_final_states) + at, t.n, t.p, t.n,
            t.G.row(0), t.G.stride());
}

// Everything of one chunk and head but dB and dC, which it leaves in their tiles.
template <class T>
void backward_chunk(const BackwardParams& params, const Head<T>& head, const Sequence& sequence,
                    int64_t i_c, T d_log_decay, BackwardTiles<T>& t, HeadSums& sums) {
  const Inputs& in = params.in;
  const int i_h = head.i_h;
  chunk_cumsum(in, head, sequence, i_c, t.decays);
  load_chunk(in.x, in.dtype, sequence, i_c, i_h, t.p, t.x);
  load_chunk(in.B, in.dtype, sequence, i_c, head.i_g, t.n, t.B);
  if (in.C) {
    load_chunk(in.C, in.dtype, sequence, i_c, head.i_g, t.n, t.C);
    load_chunk(params.dy, in.dtype, sequence, i_c, i_h, t.p, t.dy);
    score_weights(t);
    if (in.z) {
      load_chunk(in.z, in.dtype, sequence, i_c, i_h, t.p, t.z);
      gate_backward(in, head, t);
      store_chunk(t.dz, params.dz, in.dtype, sequence, i_c, i_h, t.p);
    }
    gradient_weights(t);
    gradient_C(t);
  }
  gradient_x(in, head, t, sums);
  store_chunk(t.dx, params.dx, in.dtype, sequence, i_c, i_h, t.p);
  gradient_B(in, t);
  T d_dt[kChunk];
  gradient_dt(head, t, d_log_decay, sums, d_dt);
  const int64_t token = sequence.first + i_c * kChunk;
  const StridedOut& to = params.d_dt;
  for (int i = 0; i < t.decays.count; ++i) {
    store(in.dt_dtype, to.ptr, sequence.row * to.b + (token + i) * to.l + i_h * to.h, d_dt[i]);
  }
  gradient_state(in, t);
}

template <class T>
struct Scratch {
  BackwardTiles<T> tiles;
  std::vector<T> states;
};

template <class T>
void backward_head(const BackwardParams& params, const Sequence& sequence, int64_t i_seq, int i_h,
                   bool first_of_slice, int64_t slice_at, Scratch<T>& scratch,
                   Partial<T>& partial) {
  const Inputs& in = params.in;
  const Head<T> head(in, i_h);
  BackwardTiles<T>& t = scratch.tiles;
  const int64_t i = i_seq * in.shape.h + i_h, numel = static_cast<int64_t>(t.p) * t.n;
  states_entering(in, head, sequence, i_seq, t, scratch.states);
  load_state_gradient(params, i * numel, t);
  const T d_log_decay = params.d_log_decay ? static_cast<const T*>(params.d_log_decay)[i] : T(0);
  for (int64_t i_c = sequence.chunks() - 1; i_c >= 0; --i_c) {
    load_rows(kStateDType<T>, scratch.states.data() + i_c * numel, t.n, t.p, t.n, t.S.row(0),
              t.S.stride());
    backward_chunk(params, head, sequence, i_c, d_log_decay, t, partial.heads[i]);
    accumulate(t.dB, in, sequence, i_c, head.i_g, first_of_slice, partial.dB.get() + slice_at);
    if (!in.C) continue;
    accumulate(t.dC, in, sequence, i_c, head.i_g, first_of_slice, partial.dC.get() + slice_at);
  }
  if (params.d_initial_states) {
    store_rows(kStateDType<T>, static_cast<T*>(params.d_initial_states) + i * numel, t.n, t.p, t.n,
               t.G.row(0), t.G.stride());
  }
}

// dA, dD, d_dt_bias: sums over sequences, in order.
template <class T>
void reduce_heads(const BackwardParams& params, const Partial<T>& partial) {
  const Shape& shape = params.in.shape;
  const int dD_numel = !params.dD ? 0 : params.in.D_per_channel ? shape.p : 1;
  for (int i_h = 0; i_h < shape.h; ++i_h) {
    HeadSums total{0, 0, std::vector<double>(static_cast<std::size_t>(dD_numel), 0.0)};
    for (int64_t i_seq = 0; i_seq < shape.nseq; ++i_seq) {
      const HeadSums& one = partial.heads[i_seq * shape.h + i_h];
      total.dA += one.dA;
      total.d_dt_bias += one.d_dt_bias;
      for (int k = 0; k < dD_numel; ++k) total.dD[k] += one.dD[k];
    }
    static_cast<T*>(params.dA)[i_h] = static_cast<T>(total.dA);
    if (params.d_dt_bias) {
      static_cast<T*>(params.d_dt_bias)[i_h] = static_cast<T>(total.d_dt_bias);
    }
    for (int k = 0; k < dD_numel; ++k) {
      static_cast<T*>(params.dD)[static_cast<int64_t>(i_h) * dD_numel + k] =
          static_cast<T>(total.dD[k]);
    }
  }
}

// dB or dC of every covered token: its slices summed in order, rounded once.
template <class T>
void reduce_slices(const T* partial, const Partial<T>& sizes, const Inputs& in, Covered covered,
                   const StridedOut& out) {
  const Shape& s = in.shape;
  const int64_t bytes = static_cast<int64_t>(size_of(in.dtype));
  constexpr int64_t kTokens = 64;  // a task's
  const int64_t blocks = std::max<int64_t>(0, ceil_div(covered.end - covered.begin, kTokens));
  const auto sum_token = [&](int64_t row, int64_t token, T(&sum)[256]) {
    for (int i_g = 0; i_g < s.g; ++i_g) {
      const T* from = partial + ((row * s.l + token) * s.g + i_g) * s.n;
      std::copy_n(from, s.n, sum);
      for (int i = 1; i < slices_of(s); ++i) {
        for (int k = 0; k < s.n; ++k) sum[k] += from[i * sizes.slice_numel + k];
      }
      auto* to = static_cast<char*>(out.ptr) + (row * out.b + token * out.l + i_g * out.h) * bytes;
      store_rows(in.dtype, to, 0, 1, s.n, sum, 0);
    }
  };
  parallel_tasks(
      s.b * blocks, [] { return 0; },
      [&](int64_t task, int) {
        T sum[256];
        const int64_t begin = covered.begin + task % blocks * kTokens;
        for (int64_t token = begin; token < std::min(begin + kTokens, covered.end); ++token) {
          sum_token(task / blocks, token, sum);
        }
      });
}

template <class T>
void backward_as(const BackwardParams& params) {
  const Inputs& in = params.in;
  const Shape& s = in.shape;
  const auto sequences = sequences_of(in);
  const Covered covered = covered_by(sequences, s);
  if (s.packed) {
    zero_uncovered(params.dx, in.dtype, s, covered, s.h, s.p);
    zero_uncovered(params.d_dt, in.dt_dtype, s, covered, s.h, 1);
    zero_uncovered(params.dB, in.dtype, s, covered, s.g, s.n);
    if (in.C) zero_uncovered(params.dC, in.dtype, s, covered, s.g, s.n);
    if (in.z) zero_uncovered(params.dz, in.dtype, s, covered, s.h, s.p);
  }
  Partial<T> partial(in);
  const int slices = slices_of(s), per_group = s.heads_per_group();
  parallel_tasks(
      s.nseq * s.g * slices, [&] { return Scratch<T>{BackwardTiles<T>(s), {}}; },
      [&](int64_t task, Scratch<T>& scratch) {
        const int i_slice = static_cast<int>(task % slices);
        const int i_g = static_cast<int>(task / slices % s.g);
        const int64_t i_seq = task / slices / s.g;
        const int first = per_group * i_slice / slices, last = per_group * (i_slice + 1) / slices;
        for (int i = first; i < last; ++i) {
          backward_head(params, sequences[i_seq], i_seq, i_g * per_group + i, i == first,
                        i_slice * partial.slice_numel, scratch, partial);
        }
      });
  reduce_heads(params, partial);
  reduce_slices(partial.dB.get(), partial, in, covered, params.dB);
  if (in.C) reduce_slices(partial.dC.get(), partial, in, covered, params.dC);
}

}  // namespace

void backward(const BackwardParams& params) {
  params.in.dtype == DType::f64 ? backward_as<double>(params) : backward_as<float>(params);
}

}  // namespace mamba2::ssd::cpu
