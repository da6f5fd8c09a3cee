#include "ssd_call.h"

namespace mamba2::ssd {
namespace {

// Keeps `t` alive for the call, as a copy where it cannot be read in place.

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

// Fills a BackwardCall's outputs, one after another; absent ones stay undefined.
class GradientOutputs {
 public:
  GradientOutputs(BackwardCall& call, const Tensor& x) : call_(call), x_(x) {
    state_ = state_dtype(dtype_of(x));
  }

  // Of input's dtype: the caller's destination where kernels can write it, else a new tensor.
  StridedOut like(const OptionalTensor& input, const OptionalTensor& into, Tensor& result,
                  bool any_strides = false) {
    if (!input) return {};
    if (into && (any_strides || readable_in_place(*into))) {
      return strided_out(keep(call_.kept, *into));
    }
    Tensor written = allocate(sizes_of(*input), input->scalar_type(), x_);
    if (into) {
      call_.deferred.emplace_back(*into, written);
    } else {
      result = written;
    }
    return strided_out(written);
  }
  // Of a state's dtype, contiguous.
  void* accumulated(const OptionalTensor& input, Tensor& result) {
    if (!input) return nullptr;
    result = allocate(sizes_of(*input), state_, x_);
    return result.mutable_data_ptr();
  }

 private:
  BackwardCall& call_;
  const Tensor& x_;
  DType state_;
};

}  // namespace

ForwardCall prepare_scan(const char* op, const ScanArguments& a, bool return_final_states) {
  const Shape shape = check_scan(op, a);
  const DType state = state_dtype(dtype_of(a.x));
  ForwardCall call;
  call.params.in = make_inputs(a, shape, call.kept);
  call.y = given_or_new(a.y, a.x);
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
  ForwardCall call;
  call.params.in = make_inputs(a, shape, call.kept);
  call.final_states = allocate(sizes_of_states(shape), state, a.x);
  call.params.final_states = call.final_states.mutable_data_ptr();
  call.log_decay = allocate(Sizes{shape.b, shape.h}, state, a.x);
  call.params.log_decay = call.log_decay.mutable_data_ptr();
  return call;
}

BackwardCall prepare_backward(const char* op, const ScanArguments& a,
                              const GradientArguments& gradients) {
  const Shape shape = check_scan(op, a);
  check_gradients(op, a, shape, gradients);
  BackwardCall call;
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
  GradientOutputs outputs(call, a.x);
  params.dx = outputs.like(a.x, gradients.dx, call.dx);
  params.d_dt = outputs.like(a.dt, gradients.d_dt, call.d_dt, /*any_strides=*/true);
  params.dA = outputs.accumulated(a.A, call.dA);
  params.dB = outputs.like(a.B, gradients.dB, call.dB);
  params.dC = outputs.like(a.C, gradients.dC, call.dC);
  params.dD = outputs.accumulated(a.D, call.dD);
  params.dz = outputs.like(a.z, gradients.dz, call.dz);
  params.d_dt_bias = outputs.accumulated(a.dt_bias, call.d_dt_bias);
  params.d_initial_states = outputs.accumulated(a.initial_states, call.d_initial_states);
  return call;
}

void BackwardCall::finish() {
  for (auto& [destination, written] : deferred) torch::stable::copy_(destination, written);
}

}  // namespace mamba2::ssd
