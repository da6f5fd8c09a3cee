// One call of add_norm, ready to run on any device: the checked arguments, and the output.
#pragma once
#include "../core/host.h"
#include "add_norm.h"

namespace mamba2::add_norm {

struct Call {
  Params params;
  Tensor y;
  std::vector<Tensor> kept;  // copies that params point into
};

inline Call prepare(const Tensor& residual, const OptionalTensor& x, const Tensor& weight,
                    double eps) {
  const ArgumentCheck check("add_norm", residual);
  check.floating("residual", residual);
  check.shape("residual", residual, {{"b"}, {"d"}});
  const int64_t b = residual.size(0), d = residual.size(1);
  if (d < 1 || d >= 1 << 30) check.that(false, "residual", "(b, 1 <= d < 2^30)", d);
  if (d > 1 && residual.strides()[1] != 1) {
    check.that(false, "residual's last stride", "1", residual.strides()[1]);
  }
  if (x) {
    check.shape("x", *x, {{"b", b}, {"d", d}});
    check.floating("x", *x);
    check.device("x", *x);
  }
  check.shape("weight", weight, {{"d", d}});
  check.floating("weight", weight);
  check.device("weight", weight);

  Call call;
  Params& params = call.params;
  params.b = b;
  params.d = static_cast<int>(d);
  params.residual = residual.mutable_data_ptr();
  params.residual_stride = residual.strides()[0];
  params.residual_dtype = dtype_of(residual);
  if (x) {
    call.kept.push_back(d == 1 || x->strides()[1] == 1 ? *x : compact(*x));
    params.x = call.kept.back().const_data_ptr();
    params.x_stride = call.kept.back().strides()[0];
    params.x_dtype = dtype_of(*x);
  }
  call.kept.push_back(compact(weight));
  params.weight = call.kept.back().const_data_ptr();
  params.dtype = dtype_of(weight);
  call.y = allocate(Sizes{b, d}, params.dtype, residual);
  params.y = call.y.mutable_data_ptr();
  params.eps = eps;
  return call;
}

}  // namespace mamba2::add_norm
