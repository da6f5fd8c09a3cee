// ssd_scan and ssd_segment_state on a CUDA device: check, plan, allocate, run the plan's tier.
// The host emulation registers this same file for CPU tensors, in a namespace of its own.
#include "../core/device.h"
#include "../core/nvtx.h"
#include "../core/workspace.h"
#include "ssd_scan_operators.h"
#include "tiers.h"

#ifndef MAMBA2_DISPATCH_KEY
#define MAMBA2_DISPATCH_KEY CUDA
#endif

namespace mamba2::ssd {
namespace {

// The scratch memory of a call, which may want none.
struct Scratch {
  OptionalTensor memory;
  void* first = nullptr;
  Scratch(std::size_t bytes, const Tensor& like) {
    if (bytes == 0) return;
    memory = allocate_bytes(static_cast<int64_t>(bytes + Workspace::kAlignment), like);
    const auto address = reinterpret_cast<uintptr_t>(memory->mutable_data_ptr());
    const auto aligned = (address + Workspace::kAlignment - 1) & ~(Workspace::kAlignment - 1);
    first = reinterpret_cast<void*>(aligned);
  }
};

bool has_no_token(const Shape& shape) { return shape.b == 0 || shape.l == 0; }

Tensor zeros_like(const Tensor& t) {
  Tensor zeros = allocate(sizes_of(t), t.scalar_type(), t);
  torch::stable::zero_(zeros);
  return zeros;
}

Problem problem_of(const Inputs& in, bool backward, bool save_states) {
  Problem problem;
  problem.shape = in.shape;
  problem.dtype = in.dtype;
  problem.backward = backward;
  problem.has_z = static_cast<bool>(in.z);
  problem.save_states = save_states;
  problem.D_per_channel = in.D_per_channel;
  return problem;
}
Device device_of(const OnDevice& at) {
  const Card& card = at.card();
  return {card.major, card.minor, card.sm_count};
}

// ---- forward ----

// What the forward keeps: nothing, when another tier than its own runs the backward.
int64_t kept_numel(Problem problem, const Plan& plan, const Device& device, int forced) {
  problem.backward = true;
  const Plan backward = make_plan(problem, device, forced);
  if (backward.tier != plan.tier) return 0;
  return kernels_of(plan.tier).chunk_states_numel(problem, backward);
}

int64_t scan_chunk_states_numel(int64_t b, int64_t l, int64_t h, int64_t p, int64_t g, int64_t n,
                                int64_t nseq, bool packed, bool has_z, int64_t dtype, int64_t major,
                                int64_t minor, int64_t sm_count, int64_t forced) {
  Problem problem;
  problem.shape.b = b;
  problem.shape.l = l;
  problem.shape.h = static_cast<int>(h);
  problem.shape.p = static_cast<int>(p);
  problem.shape.g = static_cast<int>(g);
  problem.shape.n = static_cast<int>(n);
  problem.shape.nseq = nseq;
  problem.shape.packed = packed;
  problem.dtype = static_cast<DType>(dtype);
  problem.has_z = has_z;
  problem.save_states = true;
  if (has_no_token(problem.shape)) return 0;
  Device device;
  device.major = static_cast<int>(major);
  device.minor = static_cast<int>(minor);
  device.sm_count = static_cast<int>(sm_count);
  const Plan plan = make_plan(problem, device, static_cast<int>(forced));
  return kept_numel(problem, plan, device, static_cast<int>(forced));
}

// Runs a prepared call with at least one token; returns what was kept for the backward, undefined
// where that is nothing.
Tensor run_forward(const char* op, ForwardCall& call, const Tensor& x, bool save_states,
                   int forced) {
  const Range range(op);
  const OnDevice at(x);
  const Device device = device_of(at);
  Problem problem = problem_of(call.params.in, false, save_states);
  const Plan plan = make_plan(problem, device, forced);
  const int64_t numel = save_states ? kept_numel(problem, plan, device, forced) : 0;
  problem.save_states = numel > 0;
  Tensor chunk_states;
  if (numel > 0) {
    chunk_states = allocate(Sizes{numel}, x.scalar_type(), x);
    call.params.chunk_states = chunk_states.mutable_data_ptr();
  }

  const TierKernels& kernels = kernels_of(plan.tier);
  const Scratch scratch(kernels.forward_workspace_bytes(problem, plan, device), x);
  at.check_launch(op, kernels.forward(call.params, plan, device, scratch.first, at.stream()));
  return chunk_states;
}

// ---- backward ----

void fill_gradients_of_nothing(BackwardCall& call, const OptionalTensor& d_final_states) {
  fill(call.dA, std::nullopt);
  fill(call.dD, std::nullopt);
  fill(call.d_dt_bias, std::nullopt);
  fill(call.d_initial_states, d_final_states);
}

BackwardResult run_backward(const char* op, const ScanArguments& arguments,
                            const GradientArguments& gradients, int forced) {
  const Range range(op);
  BackwardCall call = prepare_backward(op, arguments, gradients);
  if (has_no_token(call.params.in.shape)) {
    fill_gradients_of_nothing(call, gradients.d_final_states);
    return result_of(call);
  }
  const Tensor& x = arguments.x;
  const OnDevice at(x);
  const Device device = device_of(at);
  const bool kept = call.params.chunk_states != nullptr;
  const Problem problem = problem_of(call.params.in, true, kept);
  const Plan plan = make_plan(problem, device, forced);
  const TierKernels& kernels = kernels_of(plan.tier);
  if (kept) {
    const int64_t numel = kernels.chunk_states_numel(problem, plan);
    const bool ours = gradients.chunk_states->numel() == numel &&
                      gradients.chunk_states->scalar_type() == x.scalar_type();
    check(ours, op, ": chunk_states must be what the forward kept, ", numel, " elements of ",
          describe_dtype(x.scalar_type()), ", got ", gradients.chunk_states->numel(), " of ",
          describe_dtype(gradients.chunk_states->scalar_type()));
  }
  const Scratch scratch(kernels.backward_workspace_bytes(problem, plan, device), x);
  at.check_launch(op, kernels.backward(call.params, plan, device, scratch.first, at.stream()));
  call.finish();
  return result_of(call);
}

// What implement_scan_operators wants of a device.
struct Cuda {
  static ForwardResult forward(const ScanArguments& arguments, bool return_final_states,
                               bool save_states, int plan) {
    constexpr const char* kOp = "ssd_scan";
    const Tensor& x = arguments.x;
    ForwardCall call = prepare_scan(kOp, arguments, return_final_states);
    if (has_no_token(call.params.in.shape)) {
      fill(call.final_states, arguments.initial_states);
      return {call.y, call.final_states, Tensor()};
    }
    Tensor chunk_states = run_forward(kOp, call, x, save_states, plan);
    return {call.y, call.final_states, chunk_states};
  }

  // A segment's state has no output: dy = 0 and C = 0 then, of which only the gradients of the
  // final state and of the decay are left.
  static BackwardResult backward(const char* op, ScanArguments arguments,
                                 GradientArguments gradients, int plan) {
    if (!arguments.C) arguments.C = zeros_like(arguments.B);
    if (!gradients.dy) gradients.dy = zeros_like(arguments.x);
    return run_backward(op, arguments, gradients, plan);
  }

  static std::tuple<Tensor, Tensor> segment_state(const ScanArguments& arguments, int plan) {
    constexpr const char* kOp = "ssd_segment_state";
    ForwardCall call = prepare_segment_state(kOp, arguments);
    if (has_no_token(call.params.in.shape)) {
      fill(call.final_states, std::nullopt);
      fill(call.log_decay, std::nullopt);
    } else {
      run_forward(kOp, call, arguments.x, false, plan);
    }
    return {call.final_states, call.log_decay};
  }
};

}  // namespace

ForwardResult scan_forward_on_cuda(const ScanArguments& arguments, bool return_final_states,
                                   int plan) {
  return Cuda::forward(arguments, return_final_states, /*save_states=*/false, plan);
}

BackwardResult scan_backward_on_cuda(const ScanArguments& arguments,
                                     const GradientArguments& gradients, int plan) {
  return Cuda::backward("ssd_scan_backward", arguments, gradients, plan);
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, MAMBA2_DISPATCH_KEY, m) {
  implement_scan_operators<Cuda>(m);
}

STABLE_TORCH_LIBRARY_IMPL(MAMBA2_OP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("ssd_scan_chunk_states_numel", TORCH_BOX(&scan_chunk_states_numel));
}

}  // namespace mamba2::ssd
