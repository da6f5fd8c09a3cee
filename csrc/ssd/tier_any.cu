// Tier any: the stages in the order of the equation, for every type and size.
// Workspace, forward: states (chunks, h, p, n) and decays (chunks, h) in fp32 (fp64 for fp64), and
// the chunk table of packed sequences. The backward has the states twice, the chunks' parts of the
// parameters' gradients, and dB and dC of slices of the heads, in fp32 (fp64), where there are any.
#include "../core/search.h"
#include "../core/workspace.h"
#include "launch.h"
#include "stages_any.h"
#include "tiers.h"

namespace mamba2::ssd::any {
namespace {

constexpr int kChunkTokens = 64;  // a chunk's scores fill one tile (chunk_any.cuh)

DType accumulator_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

int64_t numel_of_states(const Shape& shape) {
  return shape.chunks(kChunkTokens) * shape.h * shape.p * shape.n;
}

// The slices of a group's heads in chunk_scan_gradient_BC: as many as keep the card busy. Its
// blocks fill an SM each; storing and adding up a slice takes about as long as a head.
int head_slices(const Shape& shape, const Plan& plan, const Device& device) {
  const int heads = shape.heads_per_group();
  constexpr int kInvariantSliceHeads = 16;  // whatever else there is to fill the card with
  if (plan.batch_invariant && heads > 0) return ceil_div(heads, kInvariantSliceHeads);
  const int64_t sms = device.sm_count < 1 ? 1 : device.sm_count;
  const int64_t blocks = shape.chunks(kChunkTokens) * shape.g * ceil_div(shape.n, 64);
  const auto cost = [&](int64_t slices) {
    const int64_t extra = slices > 1 ? 1 : 0;
    return ceil_div(blocks * slices, sms) * (ceil_div(heads, slices) + extra);
  };
  return int(cheapest(1, 2, heads + 1, cost));
}

// What lies in the workspace. With no memory behind it, it only counts.
struct ForwardMemory {
  void *chunk_table, *states, *decay;
  ForwardMemory(const Shape& shape, DType dtype, bool has_states, Workspace& memory) {
    const auto size = size_of(accumulator_of(dtype));
    chunk_table = memory.take(chunking_bytes(shape, kChunkTokens));
    states = has_states ? nullptr : memory.take(numel_of_states(shape) * size);
    decay = memory.take(shape.chunks(kChunkTokens) * shape.h * size);
  }
};
struct BackwardMemory : ForwardMemory {
  void *d_states, *dA, *d_dt_bias, *dD;
  void *dB_slices, *dC_slices;
  int slices;
  BackwardMemory(const Shape& shape, DType dtype, bool has_states, int slices, Workspace& memory)
      : ForwardMemory(shape, dtype, has_states, memory), slices(slices) {
    const auto size = size_of(accumulator_of(dtype));
    const auto rows = shape.chunks(kChunkTokens) * kChunkTokens;
    const auto sliced = slices > 1 ? slices * rows * shape.g * shape.n * size : 0;
    const auto parts = shape.chunks(kChunkTokens) * shape.h * size;
    d_states = memory.take(numel_of_states(shape) * size);
    dA = memory.take(parts);
    d_dt_bias = memory.take(parts);
    dD = memory.take(parts * shape.p);
    dB_slices = memory.take(sliced);
    dC_slices = memory.take(sliced);
  }
};

// chunk_state and state_passing: the states that enter the chunks.
int enter_states(const Work& work, void* states, void* decay, void* final_states, void* stream) {
  ChunkStateParams added;
  added.work = work;
  added.states = states;
  added.decay = decay;
  if (const int error = chunk_state(added, stream)) return error;
  StatePassingParams passing;
  passing.work = work;
  passing.states = states;
  passing.decay = decay;
  passing.from = work.in.initial_states;
  passing.to = final_states;
  return state_passing(passing, stream);
}

// The same two stages backwards: the gradients of the states that leave the chunks.
int leave_states(const BackwardParams& params, const Work& work, const BackwardMemory& memory,
                 void* stream) {
  ChunkStateParams added;
  added.work = work;
  added.dy = params.dy;
  added.states = memory.d_states;
  added.decay = memory.decay;
  if (const int error = chunk_state_gradient(added, stream)) return error;
  StatePassingParams passing;
  passing.work = work;
  passing.states = memory.d_states;
  passing.decay = memory.decay;
  passing.from = {params.d_final_states, accumulator_of(work.in.dtype)};
  passing.to = params.d_initial_states;
  return state_passing_gradient(passing, stream);
}

int gradients(const BackwardParams& params, const Work& work, const BackwardMemory& memory,
              const void* states, void* stream) {
  ChunkScanGradientParams scan;
  scan.work = work;
  scan.dy = params.dy;
  scan.states = states;
  scan.d_states = memory.d_states;
  scan.d_log_decay = params.d_log_decay;
  scan.dx = params.dx;
  scan.d_dt = params.d_dt;
  scan.dB = params.dB;
  scan.dC = params.dC;
  scan.dA = memory.dA;
  scan.d_dt_bias = memory.d_dt_bias;
  scan.dD = params.dD ? memory.dD : nullptr;
  scan.slices = memory.slices;
  scan.dB_slices = memory.dB_slices;
  scan.dC_slices = memory.dC_slices;
  if (const int error = chunk_scan_gradient_x(scan, stream)) return error;
  if (const int error = chunk_scan_gradient_BC(scan, stream)) return error;
  if (scan.slices > 1) {
    if (const int error = sum_over_slices(scan, stream)) return error;
  }

  SumOverChunksParams sums;
  sums.chunks = work.chunks;
  sums.h = work.in.shape.h;
  sums.p = work.in.shape.p;
  sums.dtype = work.in.dtype;
  sums.dD_per_channel = work.in.D_per_channel;
  sums.dA_parts = memory.dA;
  sums.d_dt_bias_parts = memory.d_dt_bias;
  sums.dD_parts = memory.dD;
  sums.dA = params.dA;
  sums.d_dt_bias = params.d_dt_bias;
  sums.dD = params.dD;
  return sum_over_chunks(sums, stream);
}

int make_work(const Inputs& in, void* chunk_table, Work* work, void* stream) {
  work->in = in;
  work->chunks = in.shape.chunks(kChunkTokens);
  return make_chunking(in, kChunkTokens, chunk_table, &work->chunking, stream);
}

}  // namespace

// States are kept as they are used, where x's type is the one they are used in.
int64_t chunk_states_numel(const Problem& problem, const Plan&) {
  return problem.dtype == accumulator_of(problem.dtype) ? numel_of_states(problem.shape) : 0;
}

std::size_t forward_workspace_bytes(const Problem& problem, const Plan& plan, const Device&) {
  Workspace counted;
  const bool kept = problem.save_states && chunk_states_numel(problem, plan) > 0;
  ForwardMemory(problem.shape, problem.dtype, kept, counted);
  return counted.bytes();
}
std::size_t backward_workspace_bytes(const Problem& problem, const Plan& plan,
                                     const Device& device) {
  Workspace counted;
  const bool kept = problem.save_states && chunk_states_numel(problem, plan) > 0;
  const int slices = head_slices(problem.shape, plan, device);
  BackwardMemory(problem.shape, problem.dtype, kept, slices, counted);
  return counted.bytes();
}

int forward(const ForwardParams& params, const Plan&, const Device&, void* workspace,
            void* stream) {
  const Inputs& in = params.in;
  Workspace carved(workspace);
  const ForwardMemory memory(in.shape, in.dtype, params.chunk_states != nullptr, carved);
  Work work;
  if (const int error = make_work(in, memory.chunk_table, &work, stream)) return error;
  const int64_t chunk_bytes =
      int64_t(in.shape.h) * in.shape.p * in.shape.n * int64_t(size_of(accumulator_of(in.dtype)));
  if (const int error = zero_beyond_last_chunk(work.chunking, in.shape, params.chunk_states,
                                               chunk_bytes, stream)) {
    return error;
  }
  void* states = params.chunk_states ? params.chunk_states : memory.states;
  if (const int error = enter_states(work, states, memory.decay, params.final_states, stream)) {
    return error;
  }
  if (params.log_decay) {
    if (const int error = segment_log_decay(in, params.log_decay, stream)) return error;
  }
  if (!params.y) return 0;

  ChunkScanParams scan;
  scan.work = work;
  scan.states = states;
  scan.y = params.y;
  if (const int error = chunk_scan(scan, stream)) return error;
  return zero_outside(params, work.chunking, stream);
}

int backward(const BackwardParams& params, const Plan& plan, const Device& device, void* workspace,
             void* stream) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  Workspace carved(workspace);
  const BackwardMemory memory(shape, in.dtype, params.chunk_states != nullptr,
                              head_slices(shape, plan, device), carved);
  Work work;
  if (const int error = make_work(in, memory.chunk_table, &work, stream)) return error;
  const void* states = params.chunk_states;
  if (!states) {
    if (const int error = enter_states(work, memory.states, memory.decay, nullptr, stream)) {
      return error;
    }
    states = memory.states;
  }
  if (in.z) {
    ChunkScanParams gate;
    gate.work = work;
    gate.states = states;
    gate.y = params.dz;
    gate.dy = params.dy;
    if (const int error = chunk_scan_gate_gradient(gate, stream)) return error;
  }
  if (const int error = leave_states(params, work, memory, stream)) return error;
  if (const int error = gradients(params, work, memory, states, stream)) return error;
  return zero_outside(params, work.chunking, stream);
}

}  // namespace mamba2::ssd::any
