#include "ssd_call.h"

namespace mamba2::ssd {
namespace {

// Keeps `t` alive for the call, as a copy where it cannot be read in place.
const Tensor& keep(std::vector<Tensor>& kept, Tensor t) {
  kept.push_back(std::move(t));
  return kept.back();
}

Strided strided(const Tensor& t) {
  const auto strides = t.strides();
  return {t.const_data_ptr(), strides[0], strides[1], strides[2]};
}
StridedOut strided_out(const Tensor& t) {
  const auto strides = t.strides();
  return {t.mutable_data_ptr(), strides[0], strides[1], strides[2]};
}

Inputs make_inputs(const ScanArguments& a, const Shape& shape, std::vector<Tensor>& kept) {
  kept.reserve(20);
  Inputs in;
  in.shape = shape;
  in.dtype = dtype_of(a.x);
  in.x = strided(keep(kept, readable(a.x)));
  in.dt = strided(keep(kept, a.dt));
  in.dt_dtype = dtype_of(a.dt);
  in.A = any_float(keep(kept, compact(a.A)));
  in.B = strided(keep(kept, readable(a.B)));
  if (a.C) in.C = strided(keep(kept, readable(*a.C)));
  if (a.D) {
    in.D = any_float(keep(kept, compact(*a.D)));
    in.D_per_channel = a.D->dim() == 2;
  }
  if (a.z) in.z = strided(keep(kept, readable(*a.z)));
  if (a.dt_bias) in.dt_bias = any_float(keep(kept, compact(*a.dt_bias)));
  in.dt_softplus = a.dt_softplus;
  in.dt_min = a.dt_min;
  in.dt_max = a.dt_max;
  if (a.initial_states) in.initial_states = any_float(keep(kept, compact(*a.initial_states)));
  if (a.cu_seqlens) {
    in.cu_seqlens = keep(kept, compact(*a.cu_seqlens)).const_data_ptr();
    in.cu_seqlens_64 = a.cu_seqlens->scalar_type() == ScalarType::Long;
  }
  if (a.seq_idx) {
    in.seq_idx = static_cast<const int*>(keep(kept, compact(*a.seq_idx)).const_data_ptr());
  }
  return in;
}

Sizes sizes_of_states(const Shape& shape) { return {shape.nseq, shape.h, shape.p, shape.n}; }

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The gradient of `input`: the caller's destination where kernels can write it, else a new tensor.
StridedOut gradient_output(BackwardCall& call, const Tensor& input, const OptionalTensor& into,
                           bool any_strides, Tensor& result) {
  if (!into) {
    result = allocate(sizes_of(input), input.scalar_type(), input);
    return strided_out(result);
  }
  if (any_strides || readable_in_place(*into)) return strided_out(keep(call.kept, *into));
  Tensor written = allocate(sizes_of(input), input.scalar_type(), input);
  call.deferred.emplace_back(*into, written);
  return strided_out(written);
}

}  // namespace

ForwardCall prepare_scan(const char* op, const ScanArguments& a, bool return_final_states) {
  const Shape shape = check_scan(op, a);
  const DType state = state_dtype(dtype_of(a.x));
  const Tensor none = absent(state, a.x);
  ForwardCall call{{}, none, none, none, {}};
  call.params.in = make_inputs(a, shape, call.kept);
  call.y = allocate({shape.b, shape.l, shape.h, shape.p}, a.x.scalar_type(), a.x);
  call.params.y = strided_out(call.y);
  if (return_final_states) {
    call.final_states = allocate(sizes_of_states(shape), state, a.x);
    call.params.final_states = call.final_states.mutable_data_ptr();
  }
  return call;
}

ForwardCall prepare_segment_state(const char* op, const ScanArguments& a) {
  const Shape shape = check_scan(op, a);
  const DType state = state_dtype(dtype_of(a.x));
  ForwardCall call{{},
                   absent(state, a.x),
                   allocate(sizes_of_states(shape), state, a.x),
                   allocate(Sizes{shape.b, shape.h}, state, a.x),
                   {}};
  call.params.in = make_inputs(a, shape, call.kept);
  call.params.final_states = call.final_states.mutable_data_ptr();
  call.params.log_decay = call.log_decay.mutable_data_ptr();
  return call;
}

BackwardCall prepare_backward(const char* op, const ScanArguments& a,
                              const GradientArguments& gradients) {
  const Shape shape = check_scan(op, a);
  check_gradients(op, a, shape, gradients);
  const DType state = state_dtype(dtype_of(a.x));
  const Tensor none = absent(state, a.x);
  BackwardCall call{{}, none, none, none, none, none, none, none, none, none, {}, {}};
  BackwardParams& params = call.params;
  params.in = make_inputs(a, shape, call.kept);
  if (gradients.dy) params.dy = strided(keep(call.kept, readable(*gradients.dy)));
  if (gradients.d_final_states) {
    params.d_final_states = keep(call.kept, compact(*gradients.d_final_states)).const_data_ptr();
  }
  if (gradients.d_log_decay) {
    params.d_log_decay = keep(call.kept, compact(*gradients.d_log_decay)).const_data_ptr();
  }
  if (gradients.chunk_states && gradients.chunk_states->numel() > 0) {
    params.chunk_states = keep(call.kept, *gradients.chunk_states).const_data_ptr();
  }
  params.dx = gradient_output(call, a.x, gradients.dx, false, call.dx);
  params.d_dt = gradient_output(call, a.dt, gradients.d_dt, true, call.d_dt);
  params.dB = gradient_output(call, a.B, gradients.dB, false, call.dB);
  if (a.C) params.dC = gradient_output(call, *a.C, gradients.dC, false, call.dC);
  if (a.z) params.dz = gradient_output(call, *a.z, gradients.dz, false, call.dz);
  const auto parameter_gradient = [&](const Tensor& input, Tensor& result) {
    result = allocate(sizes_of(input), state, a.x);
    return result.mutable_data_ptr();
  };
  params.dA = parameter_gradient(a.A, call.dA);
  if (a.D) params.dD = parameter_gradient(*a.D, call.dD);
  if (a.dt_bias) params.d_dt_bias = parameter_gradient(*a.dt_bias, call.d_dt_bias);
  if (a.initial_states) {
    params.d_initial_states = parameter_gradient(*a.initial_states, call.d_initial_states);
  }
  return call;
}

void BackwardCall::finish() {
  for (auto& [destination, written] : deferred) torch::stable::copy_(destination, written);
}

}  // namespace mamba2::ssd
