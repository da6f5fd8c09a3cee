// causal_conv1d on the CPU. A window is what a sequence's taps see: its initial states, then its
// inputs; token t sees rows t .. t + w - 1 of it, and its last w - 1 rows are the final states.
// One task a block of channels, and of a sequence where there is nothing to sum over sequences.
#include <algorithm>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "../ssd/formulas.cuh"
#include "causal_conv1d_call.h"

namespace mamba2::causal_conv1d {
namespace {

constexpr int kChannels = 32;  // of a task: the window of 64k tokens is 8 MB

struct Sequence {
  int64_t row, begin, length;
};

std::vector<Sequence> sequences_of(const Inputs& in) {
  const Shape& shape = in.shape;
  std::vector<Sequence> all(shape.nseq);
  int64_t end = 0;
  const auto bound = [&](int64_t i) {  // clamped, and a running maximum
    const int64_t v = in.cu_seqlens_64 ? static_cast<const int64_t*>(in.cu_seqlens)[i]
                                       : static_cast<const int*>(in.cu_seqlens)[i];
    return end = std::max(end, std::min(std::max<int64_t>(v, 0), shape.l));
  };
  if (shape.packed) bound(0);
  for (int64_t i = 0; i < shape.nseq; ++i) {
    const int64_t begin = shape.packed ? end : 0;
    all[i] = {shape.packed ? 0 : i, begin, (shape.packed ? bound(i + 1) : shape.l) - begin};
  }
  return all;
}

char* at(const void* ptr, int64_t element, DType dtype) {
  return static_cast<char*>(const_cast<void*>(ptr)) + element * int64_t(size_of(dtype));
}

// A block of channels [first, first + count), its taps, and room for one sequence.
template <class T>
struct Block {
  int first = 0, count = 0, w = 0;
  std::vector<T> weight, bias;        // (w, kChannels), (kChannels)
  std::vector<T> window, out, other;  // (length + w - 1, kChannels), (length, kChannels) twice

  void choose(const AnyFloat& g_weight, const AnyFloat& g_bias, int d, int width, int i_block) {
    first = i_block * kChannels;
    count = std::min(kChannels, d - first);
    w = width;
    weight.assign(std::size_t(w) * kChannels, T(0));
    bias.assign(kChannels, T(0));
    for (int c = 0; c < count; ++c) {
      for (int k = 0; k < w; ++k) {
        weight[k * kChannels + c] = cpu::load<T>(g_weight, int64_t(first + c) * w + k);
      }
      if (g_bias) bias[c] = cpu::load<T>(g_bias, first + c);
    }
  }
  void reserve(int64_t length) {
    window.assign(std::size_t(length + w - 1) * kChannels, T(0));
    out.resize(std::size_t(length) * kChannels);
    other.resize(std::size_t(length) * kChannels);
  }
  T* row(std::vector<T>& of, int64_t i) { return of.data() + i * kChannels; }
  // Rows of `ptr`, `stride` elements apart, into or out of rows of `of`.
  void load(const void* ptr, DType dtype, int64_t element, int64_t stride, int64_t rows, T* to) {
    cpu::load_rows(dtype, at(ptr, element + first, dtype), stride, int(rows), count, to, kChannels);
  }
  void store(void* ptr, DType dtype, int64_t element, int64_t stride, int64_t rows, const T* from) {
    cpu::store_rows(dtype, at(ptr, element + first, dtype), stride, int(rows), count, from,
                    kChannels);
  }
  // out = bias + sum_k weight_k window_{t + k}
  void convolve(int64_t length) {
    for (int64_t t = 0; t < length; ++t) {
      T* y = row(out, t);
      for (int c = 0; c < kChannels; ++c) y[c] = bias[c];
      for (int k = 0; k < w; ++k) {
        const T *x = row(window, t + k), *taps = weight.data() + k * kChannels;
        for (int c = 0; c < kChannels; ++c) y[c] += taps[c] * x[c];
      }
    }
  }
  void activate() {
    for (T& v : out) v = ssd::silu(v);
  }
};

template <class T>
void load_window(const Inputs& in, const Sequence& sequence, int64_t i_seq, Block<T>& block) {
  const int before = in.shape.w - 1, d = in.shape.d;
  block.reserve(sequence.length);
  if (in.initial_states) {
    block.load(in.initial_states, in.dtype, i_seq * before * d, d, before,
               block.row(block.window, 0));
  }
  block.load(in.x.ptr, in.dtype, sequence.row * in.x.b + sequence.begin * in.x.l, in.x.l,
             sequence.length, block.row(block.window, before));
}

// Tokens of no sequence.
void zero_outside(const RowsOut& out, const Inputs& in, const std::vector<Sequence>& sequences) {
  if (!in.shape.packed) return;
  const int64_t first = sequences.empty() ? in.shape.l : sequences.front().begin;
  const int64_t last =
      sequences.empty() ? in.shape.l : sequences.back().begin + sequences.back().length;
  for (int64_t t = 0; t < in.shape.l; ++t) {
    if (t >= first && t < last) continue;
    std::memset(at(out.ptr, t * out.l, in.dtype), 0, in.shape.d * size_of(in.dtype));
  }
}

template <class T>
void forward_as(const ForwardParams& params) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const auto sequences = sequences_of(in);
  const int64_t blocks = (shape.d + kChannels - 1) / kChannels;
  zero_outside(params.y, in, sequences);
  cpu::parallel_tasks(
      shape.nseq * blocks, [] { return Block<T>(); },
      [&](int64_t task, Block<T>& block) {
        const int64_t i_seq = task / blocks;
        const Sequence& sequence = sequences[i_seq];
        block.choose(in.weight, in.bias, shape.d, shape.w, static_cast<int>(task % blocks));
        load_window(in, sequence, i_seq, block);
        block.convolve(sequence.length);
        if (in.silu) block.activate();
        const int64_t y_at = sequence.row * params.y.b + sequence.begin * params.y.l;
        block.store(params.y.ptr, in.dtype, y_at, params.y.l, sequence.length, block.out.data());
        if (!params.final_states) return;
        block.store(params.final_states, in.dtype, i_seq * (shape.w - 1) * shape.d, shape.d,
                    shape.w - 1, block.row(block.window, sequence.length));
      });
}

// Sums over all sequences, which rounding shall not show in.
struct WeightSums {
  std::vector<double> weight, bias;  // (w, kChannels), (kChannels)
  explicit WeightSums(int w) : weight(std::size_t(w) * kChannels), bias(kChannels) {}
};

// The gradients of one block in one sequence, from the window (loaded) and dy: the window's own
// gradient takes its place.
template <class T>
void backward_sequence(const BackwardParams& params, const Sequence& sequence, int64_t i_seq,
                       Block<T>& block, WeightSums& sums) {
  const Inputs& in = params.in;
  const int w = in.shape.w, d = in.shape.d;
  const int64_t length = sequence.length, state_at = i_seq * (w - 1) * d;
  block.load(params.dy.ptr, in.dtype, sequence.row * params.dy.b + sequence.begin * params.dy.l,
             params.dy.l, length, block.other.data());
  if (in.silu) {
    block.convolve(length);
    for (std::size_t i = 0; i < block.other.size(); ++i) {
      block.other[i] *= ssd::silu_gradient(block.out[i]);
    }
  }
  for (int64_t t = 0; t < length; ++t) {
    const T* g = block.row(block.other, t);
    for (int c = 0; c < block.count; ++c) sums.bias[c] += g[c];
    for (int k = 0; k < w; ++k) {
      const T* x = block.row(block.window, t + k);
      for (int c = 0; c < block.count; ++c) sums.weight[k * kChannels + c] += double(g[c]) * x[c];
    }
  }
  std::fill(block.window.begin(), block.window.end(), T(0));
  if (params.d_final_states) {
    block.load(params.d_final_states, in.dtype, state_at, d, w - 1,
               block.row(block.window, length));
  }
  for (int64_t t = 0; t < length; ++t) {
    const T* g = block.row(block.other, t);
    for (int k = 0; k < w; ++k) {
      T* dx = block.row(block.window, t + k);
      for (int c = 0; c < kChannels; ++c) dx[c] += block.weight[k * kChannels + c] * g[c];
    }
  }
  if (params.d_initial_states) {
    block.store(params.d_initial_states, in.dtype, state_at, d, w - 1, block.row(block.window, 0));
  }
  block.store(params.dx.ptr, in.dtype, sequence.row * params.dx.b + sequence.begin * params.dx.l,
              params.dx.l, length, block.row(block.window, w - 1));
}

template <class T>
void backward_as(const BackwardParams& params) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const auto sequences = sequences_of(in);
  zero_outside(params.dx, in, sequences);
  cpu::parallel_tasks((shape.d + kChannels - 1) / kChannels, [] { return Block<T>(); },
                      [&](int64_t task, Block<T>& block) {
                        block.choose(in.weight, in.bias, shape.d, shape.w, static_cast<int>(task));
                        WeightSums sums(shape.w);
                        for (int64_t i_seq = 0; i_seq < shape.nseq; ++i_seq) {
                          load_window(in, sequences[i_seq], i_seq, block);
                          backward_sequence(params, sequences[i_seq], i_seq, block, sums);
                        }
                        for (int c = 0; c < block.count; ++c) {
                          const int64_t i_d = block.first + c;
                          for (int k = 0; k < shape.w; ++k) {
                            const double sum = sums.weight[k * kChannels + c];
                            static_cast<T*>(params.dweight)[i_d * shape.w + k] =
                                static_cast<T>(sum);
                          }
                          if (params.dbias)
                            static_cast<T*>(params.dbias)[i_d] = static_cast<T>(sums.bias[c]);
                        }
                      });
}

template <class T>
void step_as(const StepParams& params) {
  const int64_t blocks = (params.d + kChannels - 1) / kChannels;
  cpu::parallel_tasks(
      params.b * blocks, [] { return Block<T>(); },
      [&](int64_t task, Block<T>& block) {
        const int64_t i_b = task / blocks, y_at = i_b * params.tokens * params.d;
        const int64_t slot = params.state_indices ? params.state_indices[i_b] : i_b;
        const bool padding = slot < 0 || slot >= params.slots;
        block.choose(params.weight, params.bias, params.d, params.w,
                     static_cast<int>(task % blocks));
        block.reserve(params.tokens);
        if (padding) {
          std::fill(block.out.begin(), block.out.end(), T(0));
        } else {
          block.load(params.state, params.dtype, slot * params.slot_stride, params.d, params.w - 1,
                     block.row(block.window, 0));
          block.load(params.x.ptr, params.dtype, i_b * params.x.b, params.x.l, params.tokens,
                     block.row(block.window, params.w - 1));
          block.convolve(params.tokens);
          if (params.silu) block.activate();
          block.store(params.state, params.dtype, slot * params.slot_stride, params.d, params.w - 1,
                      block.row(block.window, params.tokens));
        }
        block.store(params.y, params.dtype, y_at, params.d, params.tokens, block.out.data());
      });
}

// ---- registration ----

Tensor conv_step(Tensor state, Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                 OptionalTensor state_indices) {
  const StepCall call = prepare_step(state, x, weight, bias, silu, state_indices);
  call.params.dtype == DType::f64 ? step_as<double>(call.params) : step_as<float>(call.params);
  return call.y;
}

}  // namespace

ForwardResult forward_on_cpu(const Arguments& arguments, bool return_final_states) {
  const ForwardCall call = prepare_forward(arguments, return_final_states);
  call.params.in.dtype == DType::f64 ? forward_as<double>(call.params)
                                     : forward_as<float>(call.params);
  return {call.y, call.final_states};
}

BackwardResult backward_on_cpu(const Tensor& dy, const OptionalTensor& d_final_states,
                               const Arguments& arguments, const OptionalTensor& dx) {
  BackwardCall call = prepare_backward(dy, d_final_states, arguments, dx);
  call.params.in.dtype == DType::f64 ? backward_as<double>(call.params)
                                     : backward_as<float>(call.params);
  call.finish();
  return {call.dx, call.dweight, call.dbias, call.d_initial_states};
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward_operator<forward_on_cpu>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward_operator<backward_on_cpu>));
  m.impl("causal_conv1d_step", TORCH_BOX(&conv_step));
}

}  // namespace mamba2::causal_conv1d
