#include "norm_linear_call.h"

namespace mamba2::norm_linear {
namespace {

// Rows whose elements are consecutive are read where they lie, whatever is between the rows.
Matrix matrix(std::vector<Tensor>& kept, const Tensor& t) {
  const bool in_place = t.size(1) == 1 || t.strides()[1] == 1;
  const Tensor& rows = keep(kept, in_place ? t : compact(t));
  return {rows.const_data_ptr(), rows.strides()[0]};
}

void check_arguments(const Arguments& a) {
  const ArgumentCheck check("norm_linear", a.x);
  check.floating("x", a.x);
  check.shape("x", a.x, {{"b"}, {"d"}});
  const int64_t b = a.x.size(0), d = a.x.size(1);
  const bool fits = d >= 1 && d <= 8192;
  if (!fits) check.that(false, "x", "(b, 1 <= d <= 8192)", describe_sizes(a.x));
  check.shape("norm_weight", a.norm_weight, {{"d", d}});
  check.floating("norm_weight", a.norm_weight);
  check.device("norm_weight", a.norm_weight);
  if (a.z) {
    check.shape("z", *a.z, {{"b", b}, {"d", d}});
    check.dtype("z", *a.z, {a.x.scalar_type()});
    check.device("z", *a.z);
  }
  check.shape("weight", a.weight, {{"o"}, {"d", d}});
  check.floating("weight", a.weight);
  check.device("weight", a.weight);
  const int64_t o = a.weight.size(0);
  if (a.bias) {
    check.shape("bias", *a.bias, {{"o", o}});
    check.floating("bias", *a.bias);
    check.device("bias", *a.bias);
  }
  if (a.residual) {
    check.shape("residual", *a.residual, {{"b", b}, {"o", o}});
    check.floating("residual", *a.residual);
    check.device("residual", *a.residual);
    if (o > 1 && a.residual->strides()[1] != 1) {
      check.that(false, "residual's last stride", "1", a.residual->strides()[1]);
    }
  }
  if (a.group_size < 1 || d % a.group_size != 0) {
    check.that(false, "group_size", "a divisor of d=" + std::to_string(d), a.group_size);
  }
}

}  // namespace

Call prepare(const Arguments& a) {
  check_arguments(a);
  Call call;
  Params& params = call.params;
  call.kept.reserve(5);
  params.b = a.x.size(0);
  params.d = static_cast<int>(a.x.size(1));
  params.s = static_cast<int>(a.group_size);
  params.o = static_cast<int>(a.weight.size(0));
  params.x_dtype = dtype_of(a.x);
  params.dtype = dtype_of(a.weight);
  params.x = matrix(call.kept, a.x);
  if (a.z) params.z = matrix(call.kept, *a.z);
  params.norm_weight = any_float(keep(call.kept, compact(a.norm_weight)));
  params.weight = keep(call.kept, compact(a.weight)).const_data_ptr();
  if (a.bias) params.bias = any_float(keep(call.kept, compact(*a.bias)));
  if (a.residual) {
    call.y = absent(params.dtype, a.x);
  } else {
    call.y = allocate(Sizes{params.b, params.o}, params.dtype, a.x);
  }
  const Tensor& out = a.residual ? *a.residual : call.y;
  params.out = {out.mutable_data_ptr(), out.strides()[0]};
  params.out_dtype = dtype_of(out);
  params.add = a.residual.has_value();
  params.eps = a.eps;
  params.norm_before_gate = a.norm_before_gate;
  // A copy of the weights is written by the kernel in front.
  params.early_weights = a.early_weights && params.weight == a.weight.const_data_ptr();
  return call;
}

CallWithNorm prepare_with_norm(const Arguments& a, const Tensor& next_weight, double next_eps,
                               int64_t dtype) {
  return {prepare(a),
          add_norm::prepare_in_place(*a.residual, std::nullopt, next_weight, next_eps, dtype)};
}

}  // namespace mamba2::norm_linear
