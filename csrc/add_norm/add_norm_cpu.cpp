// add_norm on the CPU: a task a row, in double.
#include <cmath>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "add_norm_call.h"

namespace mamba2::add_norm {
namespace {

void run_row(const Params& params, int64_t row) {
  const int64_t first = row * params.residual_stride;
  const auto residual = [&](int i) {
    return cpu::load<double>(params.residual_dtype, params.residual, first + i);
  };
  double sum = 0;
  for (int i = 0; i < params.d; ++i) {
    if (params.x) {
      const double x = cpu::load<double>(params.x_dtype, params.x, row * params.x_stride + i);
      cpu::store(params.residual_dtype, params.residual, first + i, residual(i) + x);
    }
    sum += residual(i) * residual(i);
  }
  const double r = 1 / std::sqrt(sum / params.d + params.eps);
  for (int i = 0; i < params.d; ++i) {
    const double y = residual(i) * r * cpu::load<double>(params.dtype, params.weight, i);
    cpu::store(params.dtype, params.y, row * params.d + i, y);
  }
}

Tensor add_norm(Tensor residual, OptionalTensor x, Tensor weight, double eps) {
  const Call call = prepare(residual, x, weight, eps);
  cpu::parallel_tasks(
      call.params.b, [] { return 0; }, [&](int64_t row, int) { run_row(call.params, row); });
  return call.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) { m.impl("add_norm", TORCH_BOX(&add_norm)); }

}  // namespace mamba2::add_norm
