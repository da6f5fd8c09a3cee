#include "chunk_cpu.h"

#include <algorithm>
#include <cstring>

namespace mamba2::ssd::cpu {

std::vector<Sequence> sequences_of(const Inputs& in) {
  const Shape& shape = in.shape;
  std::vector<Sequence> sequences(static_cast<std::size_t>(shape.nseq));
  if (!shape.packed) {
    for (int64_t i = 0; i < shape.nseq; ++i) sequences[i] = {i, 0, shape.l};
    return sequences;
  }
  const auto bound = [&](int64_t i) -> int64_t {
    const int64_t value = in.cu_seqlens_64 ? static_cast<const int64_t*>(in.cu_seqlens)[i]
                                           : static_cast<const int32_t*>(in.cu_seqlens)[i];
    return std::clamp<int64_t>(value, 0, shape.l);
  };
  int64_t first = bound(0);
  for (int64_t i = 0; i < shape.nseq; ++i) {
    const int64_t last = std::max(first, bound(i + 1));
    sequences[i] = {0, first, last - first};
    first = last;
  }
  return sequences;
}

Covered covered_by(const std::vector<Sequence>& sequences, const Shape& shape) {
  if (!shape.packed) return {0, shape.l};
  if (sequences.empty()) return {0, 0};  // l tokens of no sequence
  return {sequences.front().first, sequences.back().first + sequences.back().count};
}

template <class T>
void chunk_cumsum(const Inputs& in, const Head<T>& head, const Sequence& sequence, int64_t i_c,
                  Decays<T>& out) {
  out.count = sequence.tokens_in(i_c);
  const int64_t token = sequence.first + i_c * kChunk;
  const int64_t at = sequence.row * in.dt.b + token * in.dt.l + head.i_h * in.dt.h;
  const int* seq_idx = in.seq_idx ? in.seq_idx + sequence.row * in.shape.l + token : nullptr;
  double sum = 0;
  for (int i = 0; i < out.count; ++i) {
    const T dt = load<T>(in.dt_dtype, in.dt.ptr, at + i * in.dt.l);
    const auto delta = delta_of<T>(dt, head.dt_bias, in.dt_softplus, static_cast<T>(in.dt_min),
                                   static_cast<T>(in.dt_max));
    const bool reset = seq_idx && token + i > 0 && seq_idx[i] != seq_idx[i - 1];
    out.delta[i] = delta.value;
    out.slope[i] = delta.gradient;
    out.constant[i] = reset || decay_clamped<double>(delta.value, head.A);
    out.a_log2[i] = reset ? kMinDecayLog2 : decay_log2<double>(delta.value, head.A);
    sum += out.a_log2[i];
    out.entering[i] = std::exp2(static_cast<T>(sum));
  }
  out.total = std::exp2(static_cast<T>(sum));
  sum = 0;
  for (int j = out.count - 1; j >= 0; --j) {
    out.leaving[j] = std::exp2(static_cast<T>(sum));
    sum += out.a_log2[j];
  }
}
template void chunk_cumsum(const Inputs&, const Head<float>&, const Sequence&, int64_t,
                           Decays<float>&);
template void chunk_cumsum(const Inputs&, const Head<double>&, const Sequence&, int64_t,
                           Decays<double>&);

void zero_uncovered(const StridedOut& t, DType dtype, const Shape& shape, Covered covered,
                    int heads, int columns) {
  const int64_t bytes = static_cast<int64_t>(size_of(dtype));
  const auto zero_tokens = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int i = 0; i < heads; ++i) {
        std::memset(static_cast<char*>(t.ptr) + (token * t.l + i * t.h) * bytes, 0,
                    columns * bytes);
      }
    }
  };
  zero_tokens(0, covered.begin);
  zero_tokens(std::max(covered.begin, covered.end), shape.l);
}

}  // namespace mamba2::ssd::cpu
