// Tier sm80, forward: the stages on tensor cores by mma.sync, chunk-parallel, in three launches
// (more when packed, and when long sequences are cut into segments):
//   [chunk_table] -> chunk_cumsum -> chunk_state + state_passing -> chunk_scan
// Each starts while the one before it drains (programmatic dependent launch, sm_90 on).
// Workspace: delta and a_cumsum_log2, 8 bytes a token and head, and the states entering the chunks,
// 2 p n / 128 bytes a token and head, unless save_states keeps those for the backward; and what
// segments of long sequences leave (Segments in launch.h).
#include "../core/workspace.h"
#include "launch.h"
#include "stages_any.h"
#include "tiers.h"

namespace mamba2::ssd::sm80 {
namespace {

int64_t numel_of_states(const Shape& shape) {
  return shape.chunks(kChunkTokens) * shape.h * shape.p * shape.n;
}

// What lies in the workspace. With no memory behind it, it only counts.
struct ForwardMemory {
  void *chunk_table, *states;
  float *delta, *a_cumsum_log2;
  Segments segments;
  ForwardMemory(const Shape& shape, const Plan& plan, bool keeps_states, Workspace& memory)
      : segments(shape, plan) {
    const int64_t steps = shape.chunks(kChunkTokens) * shape.h * kChunkTokens;
    chunk_table = memory.take(chunking_bytes(shape, kChunkTokens));
    delta = memory.take_array<float>(steps);
    a_cumsum_log2 = memory.take_array<float>(steps);
    states = keeps_states ? nullptr : memory.take_array<uint16_t>(numel_of_states(shape));
    segments.carry = memory.take_array<float>(segments.carry_numel(shape));
  }
};

}  // namespace

std::size_t forward_workspace_bytes(const Problem& problem, const Plan& plan, const Device&) {
  Workspace counting;
  ForwardMemory(problem.shape, plan, problem.save_states, counting);
  return counting.bytes();
}

int64_t chunk_states_numel(const Problem& problem, const Plan&) {
  return numel_of_states(problem.shape);
}

int forward(const ForwardParams& params, const Plan& plan, const Device& device, void* workspace,
            void* stream) {
  const Inputs& in = params.in;
  Workspace space(workspace);
  const ForwardMemory memory(in.shape, plan, params.chunk_states != nullptr, space);
  void* states = params.chunk_states ? params.chunk_states : memory.states;
  float *delta = memory.delta, *a_cumsum_log2 = memory.a_cumsum_log2;

  Chunking chunking;
  if (int e = make_chunking(in, kChunkTokens, memory.chunk_table, &chunking, stream)) return e;
  const int64_t chunk_bytes = sizeof(uint16_t) * in.shape.h * in.shape.p * in.shape.n;
  if (int e = zero_beyond_last_chunk(chunking, in.shape, params.chunk_states, chunk_bytes, stream))
    return e;
  if (int e = chunk_cumsum(in, chunking, delta, a_cumsum_log2, stream)) return e;
  float* final_states = static_cast<float*>(params.final_states);
  if (int e = chunk_state(in, chunking, delta, a_cumsum_log2, states, final_states, memory.segments,
                          device, stream)) {
    return e;
  }
  if (params.log_decay) {  // ssd_segment_state wants no y
    if (int e = any::segment_log_decay(in, params.log_decay, stream)) return e;
  }
  if (!params.y) return 0;
  if (int e = chunk_scan(params, chunking, delta, a_cumsum_log2, states, device, stream)) return e;
  return zero_outside(params, chunking, stream);
}

}  // namespace mamba2::ssd::sm80
