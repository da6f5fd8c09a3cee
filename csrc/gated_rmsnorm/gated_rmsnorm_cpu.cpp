// gated_rmsnorm on the CPU: one task kRows rows; the gradient of the weight is summed per task,
// then over the tasks in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "../ssd/formulas.cuh"
#include "formulas.cuh"
#include "gated_rmsnorm_call.h"

namespace mamba2::gated_rmsnorm {
namespace {

constexpr int64_t kRows = 64;

template <class T>
struct Scratch {
  std::vector<T> x, z, dy, out, dz, weight;
  explicit Scratch(const Inputs& in)
      : x(in.d), z(in.d), dy(in.d), out(in.d), dz(in.d), weight(in.d) {
    for (int i = 0; i < in.d; ++i) weight[i] = cpu::load<T>(in.weight, i);
  }
};

char* row_of(const void* ptr, int64_t b, int64_t l, const Inputs& in, int64_t row) {
  const int64_t at = row / in.l * b + row % in.l * l;
  return static_cast<char*>(const_cast<void*>(ptr)) + at * int64_t(size_of(in.dtype));
}
template <class T>
void load_row(const Rows& from, const Inputs& in, int64_t row, std::vector<T>& to) {
  if (!from.ptr) return;
  cpu::load_rows(in.dtype, row_of(from.ptr, from.b, from.l, in, row), 0, 1, in.d, to.data(), 0);
}
template <class T>
void store_row(const RowsOut& to, const Inputs& in, int64_t row, const std::vector<T>& from) {
  if (!to.ptr) return;
  cpu::store_rows(in.dtype, row_of(to.ptr, to.b, to.l, in, row), 0, 1, in.d, from.data(), 0);
}

template <GateKind kGate, class T>
T silu_of(T z) {
  return kGate == GateKind::none ? T(1) : ssd::silu(z);
}

// 1 / sqrt(mean of v^2 + eps) of the group that begins at channel `first`.
template <GateKind kGate, class T>
T norm_of(const Inputs& in, const Scratch<T>& s, int first) {
  double sum = 0;  // one long sum, whose rounding every channel would share
  for (int i = first; i < first + in.s; ++i) {
    const T v = gated<kGate>(s.x[i], silu_of<kGate>(s.z[i]));
    sum += double(v) * v;
  }
  return static_cast<T>(1 / std::sqrt(sum / in.s + in.eps));
}

template <GateKind kGate, class T>
void forward_row(const ForwardParams& params, int64_t row, Scratch<T>& s) {
  const Inputs& in = params.in;
  load_row(in.x, in, row, s.x);
  load_row(in.z, in, row, s.z);
  for (int first = 0; first < in.d; first += in.s) {
    const T r = norm_of<kGate>(in, s, first);
    for (int i = first; i < first + in.s; ++i) {
      const T gate = silu_of<kGate>(s.z[i]);
      s.out[i] = output_of<kGate>(gated<kGate>(s.x[i], gate), s.weight[i], gate, r);
    }
  }
  store_row(params.y, in, row, s.out);
}

template <GateKind kGate, class T>
void backward_row(const BackwardParams& params, int64_t row, Scratch<T>& s, double* dweight) {
  const Inputs& in = params.in;
  load_row(in.x, in, row, s.x);
  load_row(in.z, in, row, s.z);
  load_row(params.dy, in, row, s.dy);
  for (int first = 0; first < in.d; first += in.s) {
    const T r = norm_of<kGate>(in, s, first);
    double sum = 0;
    for (int i = first; i < first + in.s; ++i) {
      const T gate = silu_of<kGate>(s.z[i]);
      sum += normed_gradient<kGate>(s.dy[i], s.weight[i], gate) * gated<kGate>(s.x[i], gate);
    }
    const T projection = static_cast<T>(sum * r / in.s);
    for (int i = first; i < first + in.s; ++i) {
      Gate<T> gate;
      if (kGate != GateKind::none) gate = {ssd::silu(s.z[i]), ssd::silu_gradient(s.z[i])};
      const auto g = gradients_of<kGate>(s.x[i], s.dy[i], s.weight[i], gate, r, projection);
      s.out[i] = g.dx;
      s.dz[i] = g.dz;
      dweight[i] += g.dweight;
    }
  }
  store_row(params.dx, in, row, s.out);
  store_row(params.dz, in, row, s.dz);
}

template <GateKind kGate, class T>
void forward_as(const ForwardParams& params) {
  const int64_t rows = params.in.b * params.in.l;
  cpu::parallel_tasks((rows + kRows - 1) / kRows, [&] { return Scratch<T>(params.in); },
                      [&](int64_t task, Scratch<T>& scratch) {
                        for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows);
                             ++row) {
                          forward_row<kGate>(params, row, scratch);
                        }
                      });
}

template <GateKind kGate, class T>
void backward_as(const BackwardParams& params) {
  const Inputs& in = params.in;
  const int64_t rows = in.b * in.l, tasks = (rows + kRows - 1) / kRows;
  std::vector<double> parts(std::size_t(tasks) * in.d);
  cpu::parallel_tasks(
      tasks, [&] { return Scratch<T>(in); },
      [&](int64_t task, Scratch<T>& scratch) {
        for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
          backward_row<kGate>(params, row, scratch, parts.data() + task * in.d);
        }
      });
  for (int i = 0; i < in.d; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += parts[task * in.d + i];
    static_cast<T*>(params.dweight)[i] = static_cast<T>(sum);
  }
}

// f(gate, zero): where the gate is, and a number of the type the arithmetic runs in.
template <class F>
void with_gate_and_type(const Inputs& in, F f) {
  with_gate(in.z.ptr != nullptr, in.norm_before_gate,
            [&](auto gate) { in.dtype == DType::f64 ? f(gate, double(0)) : f(gate, float(0)); });
}

Tensor norm_forward(Tensor x, Tensor weight, OptionalTensor z, double eps, int64_t group_size,
                    bool norm_before_gate) {
  return forward_on_cpu({x, weight, z, eps, group_size, norm_before_gate});
}

BackwardResult norm_backward(Tensor dy, Tensor x, Tensor weight, OptionalTensor z, double eps,
                             int64_t group_size, bool norm_before_gate, OptionalTensor dx,
                             OptionalTensor dz) {
  return defined(backward_on_cpu(dy, {x, weight, z, eps, group_size, norm_before_gate}, dx, dz), x);
}

}  // namespace

Tensor forward_on_cpu(const Arguments& arguments) {
  const ForwardCall call = prepare_forward(arguments);
  with_gate_and_type(call.params.in, [&](auto gate, auto zero) {
    forward_as<gate(), decltype(zero)>(call.params);
  });
  return call.y;
}

BackwardResult backward_on_cpu(const Tensor& dy, const Arguments& arguments,
                               const OptionalTensor& dx, const OptionalTensor& dz) {
  BackwardCall call = prepare_backward(dy, arguments, dx, dz);
  with_gate_and_type(call.params.in, [&](auto gate, auto zero) {
    backward_as<gate(), decltype(zero)>(call.params);
  });
  call.finish();
  return {call.dx, call.dweight, call.dz};
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("gated_rmsnorm_forward", TORCH_BOX(&norm_forward));
  m.impl("gated_rmsnorm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace mamba2::gated_rmsnorm
