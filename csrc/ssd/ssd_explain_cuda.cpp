// What `explain` asks: the kernels of a problem's plan, found by running its tier with nothing
// launched (core/launch_log.h). No device is needed, no tensor and no torch; Python calls it
// through ctypes (mamba2_cuda/_explain.py), so that it answers for every Python.
#include <string>

#include "../core/launch_log.h"
#include "../core/workspace.h"
#include "tiers.h"

namespace mamba2::ssd {
namespace {

// Device memory that nobody reads: a call needs addresses, aligned as an allocation's.
void* some_address() { return reinterpret_cast<void*>(Workspace::kAlignment); }

// (b, l, heads, width) without gaps.
template <class View>
View contiguous(const Shape& shape, int64_t heads, int64_t width) {
  return {some_address(), shape.l * heads * width, heads * width, width};
}

// A problem's arguments as models give them: dt_bias and softplus, no initial states.
Inputs inputs_of(const Problem& problem) {
  const Shape& shape = problem.shape;
  const AnyFloat parameter{some_address(), DType::f32};
  Inputs in;
  in.shape = shape;
  in.dtype = in.dt_dtype = problem.dtype;
  in.x = contiguous<Strided>(shape, shape.h, shape.p);
  in.dt = contiguous<Strided>(shape, shape.h, 1);
  in.A = in.D = in.dt_bias = parameter;
  in.D_per_channel = problem.D_per_channel;
  in.B = in.C = contiguous<Strided>(shape, shape.g, shape.n);
  if (problem.has_z) in.z = in.x;
  in.dt_softplus = true;
  if (shape.packed) in.cu_seqlens = some_address();
  return in;
}

int run_forward(const TierKernels& kernels, const Problem& problem, const Plan& plan,
                const Device& device) {
  const Shape& shape = problem.shape;
  ForwardParams params;
  params.in = inputs_of(problem);
  params.y = contiguous<StridedOut>(shape, shape.h, shape.p);
  params.final_states = some_address();
  if (problem.save_states) params.chunk_states = some_address();
  return kernels.forward(params, plan, device, some_address(), nullptr);
}

int run_backward(const TierKernels& kernels, const Problem& problem, const Plan& plan,
                 const Device& device) {
  const Shape& shape = problem.shape;
  BackwardParams params;
  params.in = inputs_of(problem);
  params.dy = params.in.x;
  if (problem.save_states) params.chunk_states = some_address();
  params.dx = contiguous<StridedOut>(shape, shape.h, shape.p);
  params.d_dt = contiguous<StridedOut>(shape, shape.h, 1);
  params.dB = params.dC = contiguous<StridedOut>(shape, shape.g, shape.n);
  if (problem.has_z) params.dz = params.dx;
  params.dA = params.dD = params.d_dt_bias = some_address();
  return kernels.backward(params, plan, device, some_address(), nullptr);
}

std::string as_json(const LaunchLog& log, std::size_t workspace_bytes, int error) {
  const auto pair = [](const char* name, auto value) {
    return std::string("\"") + name + "\": " + std::to_string(value);
  };
  std::string kernels;
  for (const LaunchRecord& k : log.launches) {
    kernels += kernels.empty() ? "" : ", ";
    kernels += std::string("{\"stage\": \"") + k.stage + "\", \"grid\": [" +
               std::to_string(k.grid[0]) + ", " + std::to_string(k.grid[1]) + ", " +
               std::to_string(k.grid[2]) + "], " + pair("threads", k.threads) + ", " +
               pair("shared_bytes", k.smem_bytes) + ", " + pair("registers", k.registers) +
               ", \"tile\": {" + pair("tokens", k.tile.tokens) + ", " + pair("p", k.tile.p) + ", " +
               pair("n", k.tile.n) + "}, " + pair("stages", k.tile.stages) + "}";
  }
  return "{" + pair("error", error) + ", " + pair("workspace_bytes", workspace_bytes) +
         ", \"kernels\": [" + kernels + "]}";
}

// The order in which Python gives them; all int64.
struct Question {
  int64_t b, l, h, p, g, n, nseq, packed, dtype, backward, has_z, save_states, D_per_channel;
  int64_t major, minor, sm_count, forced, card_is_here;
};

Problem problem_of(const Question& ask) {
  Problem problem;
  problem.shape = {ask.b,      ask.l,      int(ask.h), int(ask.p),
                   int(ask.g), int(ask.n), ask.nseq,   ask.packed != 0};
  problem.dtype = static_cast<DType>(ask.dtype);
  problem.backward = ask.backward != 0;
  problem.has_z = ask.has_z != 0;
  problem.save_states = ask.save_states != 0;
  problem.D_per_channel = ask.D_per_channel != 0;
  return problem;
}

}  // namespace
}  // namespace mamba2::ssd

// JSON: {error, workspace_bytes, kernels: [{stage, grid, threads, shared_bytes, registers, tile:
// {tokens, p, n}, stages}]}. The text lives until the next call of this thread.
extern "C" __attribute__((visibility("default"))) const char* mamba2_explain(
    const mamba2::ssd::Question* ask) {
  using namespace mamba2::ssd;
  static thread_local std::string answer;
  Problem problem = problem_of(*ask);
  const Device device{int(ask->major), int(ask->minor), int(ask->sm_count)};
  const Plan plan = make_plan(problem, device, int(ask->forced));
  const TierKernels& kernels = kernels_of(plan.tier);
  problem.save_states = problem.save_states && kernels.chunk_states_numel(problem, plan) > 0;
  mamba2::LaunchLog log(ask->card_is_here != 0);
  int error = 0;
  std::size_t workspace_bytes = 0;
  if (problem.shape.b > 0 && problem.shape.l > 0) {
    const auto bytes =
        problem.backward ? kernels.backward_workspace_bytes : kernels.forward_workspace_bytes;
    workspace_bytes = bytes(problem, plan, device);
    error = problem.backward ? run_backward(kernels, problem, plan, device)
                             : run_forward(kernels, problem, plan, device);
  }
  answer = as_json(log, workspace_bytes, error);
  return answer.c_str();
}
