// cross_entropy on the CPU: a task a row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/convert_cpu.h"
#include "../core/parallel_cpu.h"
#include "cross_entropy_call.h"

namespace mamba2::cross_entropy {
namespace {

// In U, which the losses have: fp32, or fp64 for fp64.
template <class U>
void run_row(const Params& params, int64_t row, std::vector<U>& v) {
  const int64_t target = params.targets[row];
  auto* logits = static_cast<char*>(params.logits) +
                 row * params.stride * static_cast<int64_t>(size_of(params.dtype));
  U& loss = static_cast<U*>(params.losses)[row];
  const bool counts = target != kIgnored;
  loss = 0;
  std::fill(v.begin(), v.end(), U(0));
  if (counts) {
    check(target >= 0 && target < params.vocab, "cross_entropy: targets must be -100 or from 0 to ",
          params.vocab - 1, ", got ", target, " in row ", row);
    cpu::load_rows(params.dtype, logits, 0, 1, params.vocab, v.data(), 0);
    const U most = *std::max_element(v.begin(), v.end()), at_target = v[target];
    double sum = 0;  // one long sum, whose rounding every element would share
    for (U& element : v) {
      element = std::exp(element - most);
      sum += element;
    }
    loss = static_cast<U>(std::log(sum)) + (most - at_target);
    if (params.scale) {
      const U scale = *static_cast<const U*>(params.scale), share = scale / static_cast<U>(sum);
      for (U& element : v) element *= share;
      v[target] -= scale;
    }
  }
  if (params.scale) cpu::store_rows(params.dtype, logits, 0, 1, params.vocab, v.data(), 0);
}

// f(zero): a number of the type the arithmetic runs in.
template <class F>
void with_working_type(DType dtype, F f) {
  dtype == DType::f64 ? f(double(0)) : f(float(0));
}

Tensor forward(Tensor logits, Tensor targets, OptionalTensor scale) {
  const Call call = prepare(logits, targets, scale);
  const Params& params = call.params;
  with_working_type(params.dtype, [&](auto zero) {
    using Row = std::vector<decltype(zero)>;
    cpu::parallel_tasks(
        params.rows, [&] { return Row(params.vocab); },
        [&](int64_t row, Row& scratch) { run_row(params, row, scratch); });
  });
  return call.losses;
}

void backward(Tensor gradient, Tensor d_loss) {
  constexpr int64_t kTask = 1 << 16;  // elements
  const ScaleParams params = prepare_scale(gradient, d_loss);
  with_working_type(params.dtype, [&](auto zero) {
    using U = decltype(zero);
    const U factor = *static_cast<const U*>(params.factor);
    if (factor == U(1)) return;
    cpu::parallel_tasks((params.numel + kTask - 1) / kTask, [] { return 0; },
                        [&](int64_t task, int) {
                          const int64_t last = std::min(params.numel, (task + 1) * kTask);
                          for (int64_t i = task * kTask; i < last; ++i) {
                            const U v = cpu::load<U>(params.dtype, params.gradient, i);
                            cpu::store(params.dtype, params.gradient, i, v * factor);
                          }
                        });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace mamba2::cross_entropy
