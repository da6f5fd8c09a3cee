// One call of gated_rmsnorm, ready to run on any device: the checked arguments, and the outputs.
#pragma once
#include <tuple>
#include <utility>

#include "../core/host.h"
#include "gated_rmsnorm.h"

namespace mamba2::gated_rmsnorm {

struct Arguments {
  Tensor x, weight;
  OptionalTensor z;
  double eps = 0;
  int64_t group_size = 0;
  bool norm_before_gate = false;
  OptionalTensor y;  // of x's shape, contiguous: where the forward writes, if not to a new tensor
};

struct ForwardCall {
  ForwardParams params;
  Tensor y;
  std::vector<Tensor> kept;  // copies that params point into
};
ForwardCall prepare_forward(const Arguments& arguments);

struct BackwardCall {
  BackwardParams params;
  Tensor dx, dweight, dz;  // undefined: absent, or written to a destination
  std::vector<Tensor> kept;
  // Destinations that kernels cannot write in place, and the tensors to copy there at the end.
  std::vector<std::pair<Tensor, Tensor>> deferred;

  // To be called when the gradients are written (or their kernels launched).
  void finish();
};
BackwardCall prepare_backward(const Tensor& dy, const Arguments& arguments,
                              const OptionalTensor& dx, const OptionalTensor& dz);

using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;
// What the operator returns of them.
inline BackwardResult defined(const BackwardResult& result, const Tensor& x) {
  const auto& [dx, dweight, dz] = result;
  const DType dtype = state_dtype(dtype_of(x));
  return {or_absent(dx, dtype, x), dweight, or_absent(dz, dtype, x)};
}

// The operators on one kind of device.
Tensor forward_on_cpu(const Arguments& arguments);
Tensor forward_on_cuda(const Arguments& arguments);
BackwardResult backward_on_cpu(const Tensor& dy, const Arguments& arguments,
                               const OptionalTensor& dx, const OptionalTensor& dz);
BackwardResult backward_on_cuda(const Tensor& dy, const Arguments& arguments,
                                const OptionalTensor& dx, const OptionalTensor& dz);

}  // namespace mamba2::gated_rmsnorm
