// add_norm on the CPU: a task kRows rows, in double; the gradient of the weight is summed per task,
// then over the tasks in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "../gated_rmsnorm/formulas.cuh"
#include "add_norm_call.h"

namespace mamba2::add_norm {
namespace {

constexpr auto kNoGate = gated_rmsnorm::GateKind::none;
constexpr int64_t kRows = 64;
using Row = std::vector<double>;

void load_row(DType dtype, const void* from, int64_t first, Row& to) {
  const auto* row = static_cast<const char*>(from) + first * int64_t(size_of(dtype));
  cpu::load_rows(dtype, row, 0, 1, static_cast<int>(to.size()), to.data(), 0);
}
void store_row(DType dtype, void* to, int64_t first, const Row& from) {
  auto* row = static_cast<char*>(to) + first * int64_t(size_of(dtype));
  cpu::store_rows(dtype, row, 0, 1, static_cast<int>(from.size()), from.data(), 0);
}
Row weight_of(const AnyFloat& weight, int d) {
  Row values(d);
  load_row(weight.dtype, weight.ptr, 0, values);
  return values;
}
double inverse_rms(const Row& v, double eps) {
  double sum = 0;
  for (const double value : v) sum += value * value;
  return 1 / std::sqrt(sum / static_cast<double>(v.size()) + eps);
}

// row(i, scratch of `rows` rows, task) for every row, tasks in parallel.
template <class RunRow>
void for_rows(int64_t count, int d, int rows, const RunRow& run_row) {
  cpu::parallel_tasks(
      ceil_div(count, kRows), [&] { return std::vector<Row>(rows, Row(d)); },
      [&](int64_t task, std::vector<Row>& scratch) {
        const int64_t last = std::min(count, (task + 1) * kRows);
        for (int64_t row = task * kRows; row < last; ++row) run_row(row, scratch, task);
      });
}

void run_forward(const ForwardParams& params) {
  const Row weight = weight_of(params.weight, params.d);
  for_rows(params.b, params.d, 2, [&](int64_t row, std::vector<Row>& scratch, int64_t) {
    Row &v = scratch[0], &other = scratch[1];
    load_row(params.residual_dtype, params.residual, row * params.residual_stride, v);
    if (params.x) {
      const int64_t out_at = row * params.residual_out_stride;
      load_row(params.x_dtype, params.x, row * params.x_stride, other);
      for (int i = 0; i < params.d; ++i) v[i] += other[i];
      store_row(params.residual_dtype, params.residual_out, out_at, v);
      load_row(params.residual_dtype, params.residual_out, out_at, v);  // rounded
    }
    const double r = inverse_rms(v, params.eps);
    for (int i = 0; i < params.d; ++i) {
      other[i] = gated_rmsnorm::output_of<kNoGate>(v[i], weight[i], 1., r);
    }
    store_row(params.dtype, params.y, row * params.d, other);
  });
}

void run_backward(const BackwardParams& params) {
  const int d = params.d;
  const Row weight = weight_of(params.weight, d);
  const int64_t tasks = ceil_div(params.b, kRows);
  std::vector<double> parts(static_cast<std::size_t>(tasks) * d);
  for_rows(params.b, d, 3, [&](int64_t row, std::vector<Row>& scratch, int64_t task) {
    Row &v = scratch[0], &dy = scratch[1], &total = scratch[2];
    load_row(params.residual_dtype, params.residual_out, row * d, v);
    load_row(params.dtype, params.dy, row * d, dy);
    std::fill(total.begin(), total.end(), 0);
    if (params.d_residual_out) {
      load_row(params.residual_dtype, params.d_residual_out, row * d, total);
    }
    const double r = inverse_rms(v, params.eps);
    double projection = 0;
    for (int i = 0; i < d; ++i) {
      projection += gated_rmsnorm::normed_gradient<kNoGate>(dy[i], weight[i], 1.) * v[i];
    }
    projection *= r / d;
    for (int i = 0; i < d; ++i) {
      const auto g = gated_rmsnorm::gradients_of<kNoGate>(
          v[i], dy[i], weight[i], gated_rmsnorm::Gate<double>{}, r, projection);
      total[i] += g.dx;
      parts[task * d + i] += g.dweight;
    }
    store_row(params.residual_dtype, params.d_residual, row * d, total);
    if (params.dx) store_row(params.x_dtype, params.dx, row * d, total);
  });
  const DType accumulated = working_dtype(params.residual_dtype, params.weight.dtype);
  for (int i = 0; i < d; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += parts[task * d + i];
    cpu::store(accumulated, params.dweight, i, sum);
  }
}

Tensor norm_in_place(Tensor residual, OptionalTensor x, Tensor weight, double eps, int64_t dtype) {
  const ForwardCall call = prepare_in_place(residual, x, weight, eps, dtype);
  run_forward(call.params);
  return call.y;
}

ForwardResult norm_forward(Tensor residual, OptionalTensor x, Tensor weight, double eps,
                           int64_t dtype) {
  const ForwardCall call = prepare_forward(residual, x, weight, eps, dtype);
  run_forward(call.params);
  return {call.residual_out, call.y};
}

BackwardResult norm_backward(Tensor dy, OptionalTensor d_residual_out, Tensor residual_out,
                             Tensor weight, double eps, int64_t x_dtype) {
  const BackwardCall call =
      prepare_backward(dy, d_residual_out, residual_out, weight, eps, x_dtype);
  run_backward(call.params);
  return {call.d_residual, call.dx, call.dweight};
}

}  // namespace

void forward_on_cpu(const ForwardCall& call) { run_forward(call.params); }

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("add_norm_", TORCH_BOX(&norm_in_place));
  m.impl("add_norm_forward", TORCH_BOX(&norm_forward));
  m.impl("add_norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace mamba2::add_norm
