// Tier sm80, backward: the stages of the forward in reverse order.
//   chunk_cumsum, chunk_state   delta, a_cumsum_log2; S, the states that enter the chunks, unless
//                               the forward kept them
//   chunk_scan_gate_backward    with z: dz, and dy becomes dy silu(z)
//   state_gradients             G, the gradients of the states that leave the chunks; K
//   chunk_scan_backward         dx, and the sums over tokens inside a chunk
//   group_scan_backward         dB, dC, E
//   delta_gradients, sum_chunks d_dt, dA, d_dt_bias, dD (delta_backward.h)
// At b 8, l 4096, h 80, p 64, g 1, n 128 it moves 4.5 GB (3.8 with kept states); the workspace is
// 0.75 GB, of which S and G are 0.67; z adds 0.34 GB for dy silu(z). Splits of the heads add
// partial sums, 17 MB a split for each of dB and dC; on 132 SMs there is one split.
#include "../core/workspace.h"
#include "delta_backward.h"
#include "plan_sm80.h"
#include "scan_backward_sm80.h"
#include "tiers.h"

namespace mamba2::ssd::sm80 {
namespace {

// What lies in the workspace. With no memory behind it, it only counts.
struct BackwardMemory {
  void *chunk_table, *S, *G, *dCB, *d_y, *delta_backward;
  float *delta, *a_cumsum_log2, *a_rest_log2, *partial, *rows, *columns, *to_state, *from_state, *K,
      *dD;
  Segments segments;

  BackwardMemory(const Problem& problem, const Plan& plan, int splits, Workspace& memory)
      : segments(problem.shape, plan) {
    const Shape& shape = problem.shape;
    const int64_t chunks = shape.chunks(q), tokens = chunks * shape.h * q;
    const int64_t states = chunks * shape.h * shape.p * shape.n;
    const int64_t partials = splits > 1 ? 2 * splits * chunks * q * shape.g * shape.n : 0;
    const int64_t ungated = problem.has_z ? shape.b * shape.l * shape.h * shape.p : 0;
    chunk_table = memory.take(chunking_bytes(shape, q));
    delta = memory.take_array<float>(tokens);
    a_cumsum_log2 = memory.take_array<float>(tokens);
    a_rest_log2 = memory.take_array<float>(tokens);
    S = memory.take(problem.save_states ? 0 : 2 * states);
    G = memory.take(2 * states);
    dCB = memory.take(2 * chunks * shape.g * splits * q * q);
    d_y = memory.take(2 * ungated);
    partial = memory.take_array<float>(partials);
    rows = a_rest_log2;  // a head's are written when those it was have been read, by one block
    columns = memory.take_array<float>(tokens);
    to_state = memory.take_array<float>(tokens);
    from_state = memory.take_array<float>(tokens * group_scan_parts(shape));
    segments.carry = memory.take_array<float>(segments.carry_numel(shape));
    K = memory.take_array<float>(chunks * shape.h * state_gradients_parts(shape));
    dD = memory.take_array<float>(chunks * shape.h * shape.p);
    delta_backward = memory.take(delta_backward_workspace_bytes(chunks, shape.h));
  }
};

// Shared memory that a block may have, by compute capability. A plan may ask for no more than
// the small cards have.
int max_smem_bytes(const Device& device, const Plan& plan) {
  if (has_small_smem(device) || plan.variant & kSmallSmem) return 99 * 1024;
  return device.major == 8 ? 163 * 1024 : 227 * 1024;
}

// One backward: its arguments, its memory, and the stages, each of which returns an error code.
struct Backward {
  const BackwardParams& params;
  const BackwardMemory& memory;
  const Device& device;
  void* stream;
  BackwardProblem problem{};
  const void* S = nullptr;
  Strided dy{};  // of the output before the gate

  int enter_states() {
    const Inputs& in = params.in;
    S = params.chunk_states ? params.chunk_states : memory.S;
    if (int error = make_chunking(in, q, memory.chunk_table, &problem.chunking, stream))
      return error;
    if (int error = chunk_cumsum(in, problem.chunking, memory.delta, memory.a_cumsum_log2, stream,
                                 memory.a_rest_log2))
      return error;
    if (params.chunk_states) return 0;
    return chunk_state(in, problem.chunking, memory.delta, memory.a_cumsum_log2, memory.S, nullptr,
                       memory.segments, device, stream, memory.G);
  }
  int pass_gate() {
    dy = params.dy;
    if (!params.in.z) return 0;
    const StridedOut d_y = contiguous(memory.d_y, params.in.shape);
    dy = {d_y.ptr, d_y.b, d_y.l, d_y.h};
    const GateBackward gate{params.dy, params.dz, d_y};
    return chunk_scan_gate_backward(params.in, gate, problem.chunking, memory.delta,
                                    memory.a_cumsum_log2, S, device, stream);
  }
  int leave_states() {
    StateGradients scan;
    scan.dy = dy;
    scan.C = params.in.C;
    scan.S = S;
    scan.S_rests = !params.chunk_states;
    const AnyFloat& initial = params.in.initial_states;
    if (initial.dtype == DType::f32) scan.initial_states = static_cast<const float*>(initial.ptr);
    scan.d_final_states = static_cast<const float*>(params.d_final_states);
    scan.G = memory.G;
    scan.K = memory.K;
    scan.d_initial_states = static_cast<float*>(params.d_initial_states);
    return state_gradients(problem, scan, stream);
  }
  int scan_chunks() {
    ChunkScanBackward scan;
    scan.x = params.in.x;
    scan.dy = dy;
    scan.B = params.in.B;
    scan.C = params.in.C;
    scan.D = params.in.D;
    scan.D_per_channel = params.in.D_per_channel;
    scan.G = memory.G;
    scan.dx = params.dx;
    scan.dCB = memory.dCB;
    scan.rows = memory.rows;
    scan.columns = memory.columns;
    scan.to_state = memory.to_state;
    scan.dD = params.dD ? memory.dD : nullptr;
    return chunk_scan_backward(problem, scan, stream);
  }
  int scan_groups() {
    GroupScanBackward scan;
    scan.x = params.in.x;
    scan.dy = dy;
    scan.B = params.in.B;
    scan.C = params.in.C;
    scan.S = S;
    scan.G = memory.G;
    scan.dCB = memory.dCB;
    scan.from_state = memory.from_state;
    scan.partial = memory.partial;
    scan.dB = params.dB;
    scan.dC = params.dC;
    return group_scan_backward(problem, scan, stream);
  }
  int finish_delta() {
    const Shape& shape = params.in.shape;
    DeltaGradientParts parts;
    parts.delta = memory.delta;
    parts.rows = memory.rows;
    parts.columns = memory.columns;
    parts.from_state = memory.from_state;
    parts.from_state_apart = problem.chunking.q;
    parts.to_state = memory.to_state;
    parts.through = memory.K;
    parts.from_state_parts = group_scan_parts(shape);
    parts.through_parts = state_gradients_parts(shape);
    parts.dD = params.dD ? memory.dD : nullptr;
    parts.dD_width = params.in.D_per_channel ? shape.h * shape.p : shape.h;
    if (int error = delta_gradients(params, parts, problem.chunking, problem.chunks,
                                    memory.delta_backward, stream)) {
      return error;
    }
    return sum_chunks(params, parts, problem.chunks, memory.delta_backward, stream);
  }
  int zero_outside_sequences() { return zero_outside(params, problem.chunking, stream); }
};

}  // namespace

std::size_t backward_workspace_bytes(const Problem& problem, const Plan& plan,
                                     const Device& device) {
  Workspace counted;
  BackwardMemory(problem, plan, plan_head_splits(problem, device, plan), counted);
  return counted.bytes();
}

int backward(const BackwardParams& params, const Plan& plan, const Device& device, void* workspace,
             void* stream) {
  const Inputs& in = params.in;
  Problem sizes;
  sizes.shape = in.shape;
  sizes.has_z = static_cast<bool>(in.z);
  sizes.save_states = params.chunk_states != nullptr;
  Workspace carved(workspace);
  const int splits = plan_head_splits(sizes, device, plan);
  const BackwardMemory memory(sizes, plan, splits, carved);
  Backward run{params, memory, device, stream};
  BackwardProblem& problem = run.problem;
  problem.shape = in.shape;
  problem.dtype = in.dtype;
  problem.chunks = static_cast<int>(in.shape.chunks(q));
  problem.delta = memory.delta;
  problem.a_cumsum_log2 = memory.a_cumsum_log2;
  problem.a_rest_log2 = memory.a_rest_log2;
  problem.segments = memory.segments;
  problem.splits = splits;
  problem.sm_count = device.sm_count;
  problem.max_smem_bytes = max_smem_bytes(device, plan);

  for (auto stage : {&Backward::enter_states, &Backward::pass_gate, &Backward::leave_states,
                     &Backward::scan_chunks, &Backward::scan_groups, &Backward::finish_delta,
                     &Backward::zero_outside_sequences}) {
    if (int error = (run.*stage)()) return error;
  }
  return 0;
}

}  // namespace mamba2::ssd::sm80
