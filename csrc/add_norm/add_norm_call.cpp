#include "add_norm_call.h"

namespace mamba2::add_norm {
namespace {

DType dtype_from(const ArgumentCheck& check, const char* name, int64_t dtype) {
  if (dtype < 0 || dtype > 3) check.that(false, name, "0, 1, 2 or 3 (core/dtype.h)", dtype);
  return static_cast<DType>(dtype);
}

// Checks what both ways have; returns d.
int64_t check_residual(const ArgumentCheck& check, const char* name, const Tensor& residual,
                       const Tensor& weight) {
  check.floating(name, residual);
  const bool has_rows = residual.dim() > 0;
  const int64_t d = has_rows ? residual.size(residual.dim() - 1) : 0;
  if (d < 1 || d >= 1 << 30) {
    check.that(false, name, "(..., 1 <= d < 2^30)", describe_sizes(residual));
  }
  check.shape("weight", weight, {{"d", d}});
  check.floating("weight", weight);
  check.device("weight", weight);
  return d;
}
void check_like(const ArgumentCheck& check, const char* name, const Tensor& t, const Tensor& like) {
  if (sizes_of(t) != sizes_of(like)) {
    check.that(false, name, describe_sizes(like), describe_sizes(t));
  }
  check.floating(name, t);
  check.device(name, t);
}

ForwardCall prepare(const ArgumentCheck& check, const Tensor& residual, const OptionalTensor& x,
                    const Tensor& weight, double eps, int64_t dtype) {
  ForwardCall call;
  ForwardParams& params = call.params;
  const int64_t d = check_residual(check, "residual", residual, weight);
  if (x) check_like(check, "x", *x, residual);
  call.kept.reserve(3);
  params.d = static_cast<int>(d);
  params.b = residual.numel() / d;
  params.residual_dtype = dtype_of(residual);
  params.weight = any_float(keep(call.kept, compact(weight)));
  params.dtype = dtype_from(check, "dtype", dtype);
  params.eps = eps;
  call.y = allocate(sizes_of(residual), params.dtype, residual);
  params.y = call.y.mutable_data_ptr();
  return call;
}
void set_x(ForwardCall& call, const Tensor& x, int64_t stride) {
  call.params.x = x.const_data_ptr();
  call.params.x_dtype = dtype_of(x);
  call.params.x_stride = stride;
  call.kept.push_back(x);
}

}  // namespace

ForwardCall prepare_forward(const Tensor& residual, const OptionalTensor& x, const Tensor& weight,
                            double eps, int64_t dtype) {
  const ArgumentCheck check("add_norm", residual);
  ForwardCall call = prepare(check, residual, x, weight, eps, dtype);
  ForwardParams& params = call.params;
  params.residual = keep(call.kept, compact(residual)).const_data_ptr();
  params.residual_stride = params.residual_out_stride = params.d;
  if (x) {
    set_x(call, compact(*x), params.d);
    call.residual_out = allocate(sizes_of(residual), params.residual_dtype, residual);
    params.residual_out = call.residual_out.mutable_data_ptr();
  } else {
    call.residual_out = absent(params.residual_dtype, residual);
  }
  return call;
}

ForwardCall prepare_in_place(const Tensor& residual, const OptionalTensor& x, const Tensor& weight,
                             double eps, int64_t dtype) {
  const ArgumentCheck check("add_norm_", residual);
  check.shape("residual", residual, {{"b"}, {"d"}});
  ForwardCall call = prepare(check, residual, x, weight, eps, dtype);
  ForwardParams& params = call.params;
  const auto strides = residual.strides();
  if (params.d > 1 && strides[1] != 1) {
    check.that(false, "residual's last stride", "1", strides[1]);
  }
  params.residual = params.residual_out = residual.mutable_data_ptr();
  params.residual_stride = params.residual_out_stride = strides[0];
  if (x) {
    const Tensor readable = params.d == 1 || x->strides()[1] == 1 ? *x : compact(*x);
    set_x(call, readable, readable.strides()[0]);
  }
  return call;
}

BackwardCall prepare_backward(const Tensor& dy, const OptionalTensor& d_residual_out,
                              const Tensor& residual_out, const Tensor& weight, double eps,
                              int64_t x_dtype) {
  const ArgumentCheck check("add_norm_backward", residual_out);
  const int64_t d = check_residual(check, "residual_out", residual_out, weight);
  check_like(check, "dy", dy, residual_out);
  BackwardCall call;
  call.kept.reserve(4);
  BackwardParams& params = call.params;
  params.d = static_cast<int>(d);
  params.b = residual_out.numel() / d;
  params.residual_dtype = dtype_of(residual_out);
  params.dtype = dtype_of(dy);
  params.dy = keep(call.kept, compact(dy)).const_data_ptr();
  if (d_residual_out) {
    check_like(check, "d_residual_out", *d_residual_out, residual_out);
    check.dtype("d_residual_out", *d_residual_out, {residual_out.scalar_type()});
    params.d_residual_out = keep(call.kept, compact(*d_residual_out)).const_data_ptr();
  }
  params.residual_out = keep(call.kept, compact(residual_out)).const_data_ptr();
  params.weight = any_float(keep(call.kept, compact(weight)));
  params.eps = eps;

  call.d_residual = allocate(sizes_of(residual_out), params.residual_dtype, residual_out);
  params.d_residual = call.d_residual.mutable_data_ptr();
  params.x_dtype = x_dtype < 0 ? params.residual_dtype : dtype_from(check, "x_dtype", x_dtype);
  if (params.x_dtype != params.residual_dtype) {
    call.dx = allocate(sizes_of(residual_out), params.x_dtype, residual_out);
    params.dx = call.dx.mutable_data_ptr();
  } else {
    call.dx = absent(params.x_dtype, residual_out);
  }
  const DType accumulated = working_dtype(params.residual_dtype, params.weight.dtype);
  call.dweight = allocate(Sizes{d}, accumulated, residual_out);
  params.dweight = call.dweight.mutable_data_ptr();
  return call;
}

}  // namespace mamba2::add_norm
