// ssd_step on the CPU: one task a head of a batch entry, its state in the arithmetic's type for all
// tokens of the call.
#include <cmath>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "formulas.cuh"
#include "ssd_step_call.h"

namespace mamba2::ssd {
namespace {

template <class T>
struct StepScratch {
  std::vector<T> state, x, z, y, B, C;
  explicit StepScratch(const Shape& s)
      : state(static_cast<std::size_t>(s.p) * s.n), x(s.p), z(s.p), y(s.p), B(s.n), C(s.n) {}
};

template <class T>
void load_row(const Strided& from, DType dtype, int64_t i_b, int64_t i_t, int i_h,
              std::vector<T>& to) {
  const int64_t at = i_b * from.b + i_t * from.l + i_h * from.h;
  const char* ptr = static_cast<const char*>(from.ptr) + at * int64_t(size_of(dtype));
  cpu::load_rows(dtype, ptr, 0, 1, static_cast<int>(to.size()), to.data(), 0);
}

// One token of one head: the state and y.
template <class T>
void step_token(const Inputs& in, int64_t i_b, int64_t i_t, int i_h, StepScratch<T>& s) {
  const int p = in.shape.p, n = in.shape.n, i_g = i_h / in.shape.heads_per_group();
  load_row(in.x, in.dtype, i_b, i_t, i_h, s.x);
  load_row(in.B, in.dtype, i_b, i_t, i_g, s.B);
  load_row(in.C, in.dtype, i_b, i_t, i_g, s.C);
  if (in.z) load_row(in.z, in.dtype, i_b, i_t, i_h, s.z);
  const int64_t i_dt = i_b * in.dt.b + i_t * in.dt.l + i_h * in.dt.h;
  const T dt = cpu::load<T>(in.dt_dtype, in.dt.ptr, i_dt);
  const T bias = in.dt_bias ? cpu::load<T>(in.dt_bias, i_h) : T(0);
  const T delta = delta_of(dt, bias, in.dt_softplus, T(in.dt_min), T(in.dt_max)).value;
  const T decay = std::exp(delta * cpu::load<T>(in.A, i_h));
  for (int i = 0; i < p; ++i) {
    T* H = s.state.data() + int64_t(i) * n;
    const T weight = delta * s.x[i];
    T y = 0;
    for (int k = 0; k < n; ++k) {
      H[k] = decay * H[k] + weight * s.B[k];
      y += H[k] * s.C[k];
    }
    if (in.D) y += cpu::load<T>(in.D, in.D_per_channel ? int64_t(i_h) * p + i : i_h) * s.x[i];
    s.y[i] = in.z ? y * silu(s.z[i]) : y;
  }
}

template <class T>
void step_head(const StepParams& params, int64_t i_b, int i_h, StepScratch<T>& s) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const StepSlots slots = slots_of(params, i_b);
  const int64_t numel = int64_t(shape.p) * shape.n;
  const auto state_at = [&](int64_t slot) {
    return static_cast<char*>(params.state) +
           (slot * params.slot_stride + i_h * numel) * int64_t(size_of(params.state_dtype));
  };
  if (slots.source < 0) {
    s.y.assign(s.y.size(), T(0));
  } else {
    cpu::load_rows(params.state_dtype, state_at(slots.source), shape.n, shape.p, shape.n,
                   s.state.data(), shape.n);
  }
  for (int64_t i_t = 0; i_t < shape.l; ++i_t) {
    if (slots.source >= 0) step_token(in, i_b, i_t, i_h, s);
    const int64_t at = ((i_b * shape.l + i_t) * shape.h + i_h) * shape.p;
    char* y = static_cast<char*>(params.y) + at * int64_t(size_of(in.dtype));
    cpu::store_rows(in.dtype, y, 0, 1, shape.p, s.y.data(), 0);
  }
  if (slots.source < 0 || slots.target < 0) return;
  cpu::store_rows(params.state_dtype, state_at(slots.target), shape.n, shape.p, shape.n,
                  s.state.data(), shape.n);
}

template <class T>
void step_as(const StepParams& params) {
  const Shape& shape = params.in.shape;
  cpu::parallel_tasks(
      shape.b * shape.h, [&] { return StepScratch<T>(shape); },
      [&](int64_t task, StepScratch<T>& scratch) {
        step_head(params, task / shape.h, static_cast<int>(task % shape.h), scratch);
      });
}

Tensor step(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
            OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus, double dt_min,
            double dt_max, OptionalTensor state_indices, OptionalTensor out_state_indices,
            int64_t /*plan*/, bool early_state) {
  const StepCall call = prepare_step({state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min,
                                      dt_max, state_indices, out_state_indices, early_state});
  call.params.in.dtype == DType::f64 ? step_as<double>(call.params) : step_as<float>(call.params);
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) { m.impl("ssd_step", TORCH_BOX(&step)); }

}  // namespace mamba2::ssd
