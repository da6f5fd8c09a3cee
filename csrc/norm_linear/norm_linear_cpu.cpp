// norm_linear and its kin on the CPU: a task a row, summed in double.
#include <cmath>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "../ssd/formulas.cuh"
#include "norm_linear_operators.h"

namespace mamba2::norm_linear {
namespace {

double element(const Matrix& from, DType dtype, int64_t row, int i) {
  return cpu::load<double>(dtype, from.ptr, row * from.stride + i);
}

// The normed row, rounded to the dtype of the weights.
void norm_row(const Params& params, int64_t row, std::vector<double>& v) {
  std::vector<double> outside(params.d, 1);
  for (int i = 0; i < params.d; ++i) {
    v[i] = element(params.x, params.x_dtype, row, i);
    if (!params.z.ptr) continue;
    const double silu = ssd::silu(element(params.z, params.x_dtype, row, i));
    const auto gate = gate_of(silu, params.norm_before_gate);
    v[i] *= gate.inside;
    outside[i] = gate.outside;
  }
  for (int first = 0; first < params.d; first += params.s) {
    double sum = 0;
    for (int i = first; i < first + params.s; ++i) sum += v[i] * v[i];
    const double r = 1 / std::sqrt(sum / params.s + params.eps);
    for (int i = first; i < first + params.s; ++i) {
      v[i] *= r * cpu::load<double>(params.norm_weight, i) * outside[i];
      cpu::with_element_type(params.dtype, [&](auto* type) {
        v[i] = static_cast<double>(static_cast<std::remove_pointer_t<decltype(type)>>(v[i]));
      });
    }
  }
}

void multiply_row(const Params& params, int64_t row, const std::vector<double>& v) {
  for (int output = 0; output < params.o; ++output) {
    double sum = params.bias ? cpu::load<double>(params.bias, output) : 0;
    for (int i = 0; i < params.d; ++i) {
      sum += v[i] * cpu::load<double>(params.dtype, params.weight, int64_t(output) * params.d + i);
    }
    const int64_t at = row * params.out.stride + output;
    if (params.add) sum += cpu::load<double>(params.out_dtype, params.out.ptr, at);
    cpu::store(params.out_dtype, params.out.ptr, at, sum);
  }
}

void run_rows(const Params& params) {
  cpu::parallel_tasks(
      params.b, [&] { return std::vector<double>(params.d); },
      [&](int64_t row, std::vector<double>& v) {
        norm_row(params, row, v);
        multiply_row(params, row, v);
      });
}

void run_norm_linear(const Call& call, const Tensor& /*x*/) { run_rows(call.params); }

void run_with_norm(const CallWithNorm& call, const Tensor& /*x*/) {
  run_rows(call.product.params);
  add_norm::forward_on_cpu(call.next);
}

// The convolution's step of row `row`, in the place of its product.
void convolve_row(const Params& params, const ConvStep& conv, int64_t row) {
  for (int i = 0; i < conv.d; ++i) {
    const int64_t at = row * params.out.stride + conv.first + i;
    double newest = cpu::load<double>(DType::bf16, params.out.ptr, at);
    double sum = conv.bias ? cpu::load<double>(DType::bf16, conv.bias, i) : 0;
    const int64_t taps = int64_t(i) * conv.w;
    sum += cpu::load<double>(DType::bf16, conv.weight, taps + conv.w - 1) * newest;
    for (int k = conv.w - 2; k >= 0; --k) {  // each input moves one place up
      const int64_t state_at = row * conv.state_stride + int64_t(k) * conv.d + i;
      const double input = cpu::load<double>(DType::bf16, conv.state, state_at);
      sum += cpu::load<double>(DType::bf16, conv.weight, taps + k) * input;
      cpu::store(DType::bf16, conv.state, state_at, newest);
      newest = input;
    }
    cpu::store(DType::bf16, params.out.ptr, at, conv.silu ? ssd::silu(sum) : sum);
  }
}

void run_rows_call(const RowsCall& call, const Tensor& /*x*/) {
  const Params& params = call.params;
  cpu::parallel_tasks(
      params.b, [&] { return std::vector<double>(params.d); },
      [&](int64_t row, std::vector<double>& v) {
        for (int i = 0; i < params.d; ++i) v[i] = element(params.x, params.x_dtype, row, i);
        multiply_row(params, row, v);
        convolve_row(params, call.conv, row);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("norm_linear", TORCH_BOX(&norm_linear_operator<run_norm_linear>));
  m.impl("norm_linear_add_norm_", TORCH_BOX(&norm_linear_add_norm_operator<run_with_norm>));
  m.impl("linear_rows", TORCH_BOX(&linear_rows_operator<run_rows_call>));
}

}  // namespace mamba2::norm_linear
