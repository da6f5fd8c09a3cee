#include "gated_rmsnorm_call.h"

namespace mamba2::gated_rmsnorm {
namespace {

void check_like_x(const ArgumentCheck& check, const char* name, const Tensor& t, const Tensor& x) {
  check.shape(name, t, {{"b", x.size(0)}, {"l", x.size(1)}, {"d", x.size(2)}});
  check.dtype(name, t, {x.scalar_type()});
  check.device(name, t);
}

Inputs check_and_make(const char* op, const Arguments& a, std::vector<Tensor>& kept) {
  const ArgumentCheck check(op, a.x);
  check.floating("x", a.x);
  check.shape("x", a.x, {{"b"}, {"l"}, {"d"}});
  const int64_t d = a.x.size(2);
  const bool fits = d >= 1 && d < 1 << 30;
  if (!fits) check.that(false, "x", "(b, l, 1 <= d < 2^30)", describe_sizes(a.x));
  check.shape("weight", a.weight, {{"d", d}});
  check.floating("weight", a.weight);
  check.device("weight", a.weight);
  if (a.z) check_like_x(check, "z", *a.z, a.x);
  if (a.group_size < 1 || d % a.group_size != 0) {
    check.that(false, "group_size", "a divisor of d=" + std::to_string(d), a.group_size);
  }
  kept.reserve(4);
  Inputs in;
  in.b = a.x.size(0);
  in.l = a.x.size(1);
  in.d = static_cast<int>(d);
  in.s = static_cast<int>(a.group_size);
  in.dtype = dtype_of(a.x);
  in.x = rows(keep(kept, readable(a.x)));
  if (a.z) in.z = rows(keep(kept, readable(*a.z)));
  in.weight = any_float(keep(kept, compact(a.weight)));
  in.eps = a.eps;
  in.norm_before_gate = a.norm_before_gate;
  return in;
}

}  // namespace

ForwardCall prepare_forward(const Arguments& a) {
  ForwardCall call;
  call.params.in = check_and_make("gated_rmsnorm", a, call.kept);
  call.y = given_or_new(a.y, a.x);
  call.params.y = rows_out(call.y);
  return call;
}

BackwardCall prepare_backward(const Tensor& dy, const Arguments& a, const OptionalTensor& dx,
                              const OptionalTensor& dz) {
  constexpr const char* kOp = "gated_rmsnorm_backward";
  BackwardCall call;
  BackwardParams& params = call.params;
  params.in = check_and_make(kOp, a, call.kept);
  const ArgumentCheck check(kOp, a.x);
  check_like_x(check, "dy", dy, a.x);
  if (dx) check_like_x(check, "dx", *dx, a.x);
  if (dz) check_like_x(check, "dz", *dz, a.x);
  if (dz && !a.z) check.that(false, "dz", "None without z", "a tensor");
  params.dy = rows(keep(call.kept, readable(dy)));

  const DType accumulated = state_dtype(params.in.dtype);
  const auto output = [&](bool wanted, const OptionalTensor& into, Tensor& result) -> RowsOut {
    if (!wanted) return {};
    if (into && readable_in_place(*into)) return rows_out(*into);
    Tensor written = allocate(sizes_of(a.x), a.x.scalar_type(), a.x);
    if (into) {
      call.deferred.emplace_back(*into, written);
    } else {
      result = written;
    }
    return rows_out(written);
  };
  params.dx = output(true, dx, call.dx);
  params.dz = output(a.z.has_value(), dz, call.dz);
  call.dweight = allocate(Sizes{params.in.d}, accumulated, a.x);
  params.dweight = call.dweight.mutable_data_ptr();
  return call;
}

void BackwardCall::finish() {
  for (auto& [destination, written] : deferred) torch::stable::copy_(destination, written);
}

}  // namespace mamba2::gated_rmsnorm
