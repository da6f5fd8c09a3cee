#include "causal_conv1d_call.h"

#include <limits>

namespace mamba2::causal_conv1d {
namespace {

constexpr const char* kForward = "causal_conv1d";
constexpr const char* kBackward = "causal_conv1d_backward";
constexpr const char* kStep = "causal_conv1d_step";

// weight (d, w) and bias (d) beside the d channels of x; returns w.
int check_weights(const ArgumentCheck& check, const Tensor& weight, const OptionalTensor& bias,
                  int64_t d) {
  check.shape("weight", weight, {{"d", d}, {"w"}});
  check.floating("weight", weight);
  check.device("weight", weight);
  const int64_t w = weight.size(1);
  if (w < kMinWidth || w > kMaxWidth) check.that(false, "weight's w", "in 2..4", w);
  if (bias) {
    check.shape("bias", *bias, {{"d", d}});
    check.floating("bias", *bias);
    check.device("bias", *bias);
  }
  return static_cast<int>(w);
}

Dims dims_of_states(const Shape& s) {
  return {{s.packed ? "nseq" : "b", s.nseq}, {"w - 1", s.w - 1}, {"d", s.d}};
}
void check_states(const ArgumentCheck& check, const char* name, const OptionalTensor& t,
                  const Shape& shape, ScalarType dtype) {
  if (!t) return;
  check.shape(name, *t, dims_of_states(shape));
  check.dtype(name, *t, {dtype});
  check.device(name, *t);
}

Shape check_arguments(const char* op, const Arguments& a) {
  const ArgumentCheck check(op, a.x);
  check.floating("x", a.x);
  check.shape("x", a.x, {{"b"}, {"l"}, {"d"}});
  Shape shape;
  shape.b = shape.nseq = a.x.size(0);
  shape.l = a.x.size(1);
  const bool fits = shape.l <= std::numeric_limits<int32_t>::max() && a.x.size(2) >= 1;
  if (!fits) check.that(false, "x", "(b, l < 2^31, d >= 1)", describe_sizes(a.x));
  shape.d = static_cast<int>(a.x.size(2));
  shape.w = check_weights(check, a.weight, a.bias, shape.d);
  if (a.cu_seqlens) {
    shape.packed = true;
    shape.nseq = check_cu_seqlens(check, *a.cu_seqlens, shape.b);
  }
  check_states(check, "initial_states", a.initial_states, shape, a.x.scalar_type());
  return shape;
}

Inputs make_inputs(const Arguments& a, const Shape& shape, std::vector<Tensor>& kept) {
  kept.reserve(8);
  Inputs in;
  in.shape = shape;
  in.dtype = dtype_of(a.x);
  in.x = rows(keep(kept, readable(a.x)));
  in.weight = any_float(keep(kept, compact(a.weight)));
  if (a.bias) in.bias = any_float(keep(kept, compact(*a.bias)));
  if (a.initial_states) {
    in.initial_states = keep(kept, compact(*a.initial_states)).const_data_ptr();
  }
  if (a.cu_seqlens) {
    in.cu_seqlens = keep(kept, compact(*a.cu_seqlens)).const_data_ptr();
    in.cu_seqlens_64 = a.cu_seqlens->scalar_type() == ScalarType::Long;
  }
  in.silu = a.silu;
  return in;
}

Sizes sizes_of_states(const Shape& s) { return {s.nseq, s.w - 1, s.d}; }

}  // namespace

ForwardCall prepare_forward(const Arguments& a, bool return_final_states) {
  const Shape shape = check_arguments(kForward, a);
  ForwardCall call;
  call.params.in = make_inputs(a, shape, call.kept);
  call.y = given_or_new(a.y, a.x);
  call.params.y = rows_out(call.y);
  if (return_final_states) {
    call.final_states = allocate(sizes_of_states(shape), a.x.scalar_type(), a.x);
    call.params.final_states = call.final_states.mutable_data_ptr();
  }
  return call;
}

BackwardCall prepare_backward(const Tensor& dy, const OptionalTensor& d_final_states,
                              const Arguments& a, const OptionalTensor& dx) {
  const Shape shape = check_arguments(kBackward, a);
  const ArgumentCheck check(kBackward, a.x);
  const ScalarType dtype = a.x.scalar_type();
  const auto like_x = [&](const char* name, const Tensor& t) {
    check.shape(name, t, {{"b", shape.b}, {"l", shape.l}, {"d", shape.d}});
    check.dtype(name, t, {dtype});
    check.device(name, t);
  };
  like_x("dy", dy);
  if (dx) like_x("dx", *dx);
  check_states(check, "d_final_states", d_final_states, shape, dtype);

  BackwardCall call;
  BackwardParams& params = call.params;
  params.in = make_inputs(a, shape, call.kept);
  params.dy = rows(keep(call.kept, readable(dy)));
  if (d_final_states) {
    params.d_final_states = keep(call.kept, compact(*d_final_states)).const_data_ptr();
  }
  const bool in_place = dx && readable_in_place(*dx);
  call.written = in_place ? *dx : allocate(sizes_of(a.x), dtype, a.x);
  params.dx = rows_out(call.written);
  if (!dx) call.dx = call.written;
  if (dx && !in_place) call.destination = dx;

  const DType accumulated = state_dtype(params.in.dtype);
  call.dweight = allocate(Sizes{shape.d, shape.w}, accumulated, a.x);
  params.dweight = call.dweight.mutable_data_ptr();
  if (a.bias) {
    call.dbias = allocate(Sizes{shape.d}, accumulated, a.x);
    params.dbias = call.dbias.mutable_data_ptr();
  }
  if (a.initial_states) {
    call.d_initial_states = allocate(sizes_of_states(shape), dtype, a.x);
    params.d_initial_states = call.d_initial_states.mutable_data_ptr();
  }
  return call;
}

void BackwardCall::finish() {
  if (destination) torch::stable::copy_(*destination, written);
}

StepCall prepare_step(const Tensor& state, const Tensor& x, const Tensor& weight,
                      const OptionalTensor& bias, bool silu, const OptionalTensor& state_indices) {
  const ArgumentCheck check(kStep, x);
  check.floating("x", x);
  check.shape("x", x, {{"b"}, {"d"}}, {{"b"}, {"T"}, {"d"}});
  const bool many = x.dim() == 3;
  StepCall call;
  call.kept.reserve(4);
  StepParams& params = call.params;
  params.b = x.size(0);
  params.tokens = many ? x.size(1) : 1;
  params.d = static_cast<int>(x.size(x.dim() - 1));
  params.w = check_weights(check, weight, bias, params.d);
  const Dim slots = state_indices ? Dim{"slots"} : Dim{"b", params.b};
  check.shape("state", state, {slots, {"w - 1", params.w - 1}, {"d", params.d}});
  check.dtype("state", state, {x.scalar_type()});
  check.device("state", state);
  const auto strides = state.strides();
  const bool in_place =
      (params.d == 1 || strides[2] == 1) && (params.w == 2 || strides[1] == params.d);
  if (!in_place) check.that(false, "state", "contiguous within a slot", "other strides");
  if (state_indices) {
    check.shape("state_indices", *state_indices, {{"b", params.b}});
    check.dtype("state_indices", *state_indices, {ScalarType::Int});
    check.device("state_indices", *state_indices);
    const Tensor& indices = keep(call.kept, compact(*state_indices));
    params.state_indices = static_cast<const int*>(indices.const_data_ptr());
  }
  params.dtype = dtype_of(x);
  params.state = state.mutable_data_ptr();
  params.slots = state.size(0);
  params.slot_stride = strides[0];
  const Tensor& in = keep(call.kept, readable(x));
  params.x = {in.const_data_ptr(), in.strides()[0], many ? in.strides()[1] : 0};
  params.weight = any_float(keep(call.kept, compact(weight)));
  if (bias) params.bias = any_float(keep(call.kept, compact(*bias)));
  params.silu = silu;
  call.y = allocate(sizes_of(x), x.scalar_type(), x);
  params.y = call.y.mutable_data_ptr();
  return call;
}

}  // namespace mamba2::causal_conv1d
