// One call of add_norm, ready to run on any device: the checked arguments, and the outputs.
#pragma once
#include <tuple>

#include "../core/host.h"
#include "add_norm.h"

namespace mamba2::add_norm {

struct ForwardCall {
  ForwardParams params;
  Tensor residual_out, y;    // residual_out: 0 elements without x, or in place
  std::vector<Tensor> kept;  // copies that params point into
};
// dtype, of y, is core/dtype.h's integer.
ForwardCall prepare_forward(const Tensor& residual, const OptionalTensor& x, const Tensor& weight,
                            double eps, int64_t dtype);
// The same where residual (b, d) itself is written.
ForwardCall prepare_in_place(const Tensor& residual, const OptionalTensor& x, const Tensor& weight,
                             double eps, int64_t dtype);

// Runs what was prepared, on the CPU.
void forward_on_cpu(const ForwardCall& call);

struct BackwardCall {
  BackwardParams params;
  Tensor d_residual, dx, dweight;  // dx: 0 elements where nothing was added, or as d_residual
  std::vector<Tensor> kept;
};
// x_dtype is core/dtype.h's integer, or -1 without x.
BackwardCall prepare_backward(const Tensor& dy, const OptionalTensor& d_residual_out,
                              const Tensor& residual_out, const Tensor& weight, double eps,
                              int64_t x_dtype);

using ForwardResult = std::tuple<Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace mamba2::add_norm
