// Tier sm90, forward: fused_scan in one or two passes.
#include <algorithm>

#include "../core/tensor_map.h"
#include "../core/workspace.h"
#include "fused_scan_sm90.h"
#include "launch.h"
#include "plan_sm90.h"
#include "stages_any.h"
#include "tiers.h"

namespace mamba2::ssd::sm90 {
namespace {

// So few segments are added up by whoever needs the sum; more are worth a kernel of their own.
constexpr int kFewSegments = 5;

// Device memory of a forward, and how its work is cut.
struct Layout {
  int units, segments;  // segments: of a row, or of all (two passes)
  int tasks, prefixes;
  int word_count;  // of tickets and flags; 0: no task waits for another
  void *chunking, *kept_chunking;
  int* words;           // the ticket, then flags
  float* carry;         // (slots, units, 64 n)
  float* through_log2;  // (segments, units)

  Layout(const Shape& shape, const Plan& plan, bool keeps, Workspace& memory) {
    const bool tickets = plan.variant == kTickets, passes = plan.variant == kSegments;
    const int64_t chunks = shape.chunks(kQ), rows = shape.nseq;
    const int64_t row_chunks = shape.packed ? chunks : chunks / (rows > 0 ? rows : 1);
    const int64_t cut = ceil_div(passes ? chunks : row_chunks, int64_t(plan.segment_chunks));
    const int64_t in_row = plan.variant == kPrefixes ? runs_of(plan) : cut;
    const bool chained = tickets && in_row > 1;
    const int64_t slots = passes ? in_row : chained ? rows : 0;
    units = shape.h * ceil_div(shape.p, kP);
    segments = int(in_row);
    const int blocks_per_group = ceil_div(units / shape.g, units_per_block(shape.n));
    const int64_t of_a_run = (passes ? 1 : rows) * shape.g * blocks_per_group;
    prefixes = plan.variant == kPrefixes ? int(of_a_run * (in_row - 1)) : 0;
    tasks = int(of_a_run * in_row) + prefixes;
    word_count = chained ? int(1 + rows * units * parts_per_unit(shape.n)) : 0;
    chunking = memory.take(chunking_bytes(shape, kQ));
    kept_chunking = memory.take(keeps ? chunking_bytes(shape, kKeptQ) : 0);
    words = memory.take_array<int>(word_count);
    carry = memory.take_array<float>(slots * units * kP * padded_n(shape.n));
    through_log2 = memory.take_array<float>(passes ? in_row * units : 0);
  }
};

// (b, l, h or g, width) as a tensor map, innermost first; boxes of kQ tokens x 64 columns.
int map_of(ptx::TensorMap* map, DType dtype, const Shape& shape, const void* base, int64_t b,
           int64_t l, int64_t h, int heads, int width) {
  const int64_t size = int64_t(size_of(dtype));
  const int64_t dims[4] = {width, heads, shape.l, shape.b};
  const int64_t strides[3] = {h * size, l * size, b * size};
  const int box[4] = {tile::kPanelColumns, 1, kQ, 1};
  return make_tensor_map(map, dtype, base, 4, dims, strides, box, true);
}
// (b, l, g, n) of B or C the same way, panels of 64 columns as a dimension: one box is 64 tokens of
// all columns, as the kernel wants them.
int map_of_panels(ptx::TensorMap* map, const Inputs& in, const Strided& t) {
  const int64_t size = int64_t(size_of(in.dtype)), n = in.shape.n, panel = tile::kPanelColumns;
  const int panels = int(ceil_div(n, panel));
  const int64_t dims[5] = {std::min(n, panel), in.shape.l, panels, in.shape.g, in.shape.b};
  const int64_t strides[4] = {t.l * size, panel * size, t.h * size, t.b * size};
  const int box[5] = {tile::kPanelColumns, kQ, panels, 1, 1};
  return make_tensor_map(map, in.dtype, t.ptr, 5, dims, strides, box, true);
}
template <class View>
int map_of(ptx::TensorMap* map, const Inputs& in, const View& t, int heads, int width) {
  return map_of(map, in.dtype, in.shape, t.ptr, t.b, t.l, t.h, heads, width);
}

int make_maps(const ForwardParams& params, FusedScanArgs* args) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  if (int e = map_of(&args->x, in, in.x, shape.h, shape.p)) return e;
  if (int e = map_of_panels(&args->B, in, in.B)) return e;
  if (int e = map_of_panels(&args->C, in, in.C ? in.C : in.B)) return e;
  if (int e = map_of(&args->z, in, in.z ? in.z : in.x, shape.h, shape.p)) return e;
  const Strided y{params.y.ptr, params.y.b, params.y.l, params.y.h};
  return map_of(&args->y, in, y.ptr ? y : in.x, shape.h, shape.p);
}

}  // namespace

std::size_t forward_workspace_bytes(const Problem& problem, const Plan& plan, const Device&) {
  Workspace counting;
  Layout(problem.shape, plan, problem.save_states, counting);
  return counting.bytes();
}

// The states that enter chunks of the backward, as images of 64 channels. None where two scanners
// share a state; nor where the backward would not be faster: its sweeps over states and over their
// gradients, of two units a block and one block an SM, then have room side by side.
int64_t chunk_states_numel(const Problem& problem, const Plan& plan) {
  constexpr int kSMs = 132;
  const Shape& shape = problem.shape;
  const int64_t units = shape.h * ceil_div(shape.p, kP), in_group = units / shape.g;
  const bool crowded = 2 * shape.nseq * shape.g * ceil_div(in_group, 2) > kSMs;
  if (parts_per_unit(shape.n) > 1 || !(crowded || plan.batch_invariant)) return 0;
  return shape.chunks(kKeptQ) * units * kP * shape.n;
}

int forward(const ForwardParams& params, const Plan& chosen, const Device& device, void* workspace,
            void* stream) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const bool state_only = params.y.ptr == nullptr;  // ssd_segment_state: whole rows, one pass
  Plan plan = chosen;
  if (state_only) plan.variant = kTickets, plan.segment_chunks = int(shape.chunks(kQ));
  const bool gate = static_cast<bool>(in.z);
  const bool keeps = params.chunk_states != nullptr;
  Workspace memory(workspace);
  const Layout at(shape, plan, keeps, memory);

  FusedScanArgs args{};
  if (int e = make_chunking(in, kQ, at.chunking, &args.chunking, stream)) return e;
  if (keeps) {
    if (int e = make_chunking(in, kKeptQ, at.kept_chunking, &args.kept_chunking, stream)) return e;
  }
  if (int e = make_maps(params, &args)) return e;
  args.rows = int(shape.nseq);
  args.h = shape.h, args.p = shape.p, args.g = shape.g, args.n = shape.n;
  args.set_units();
  args.steps = step_inputs(in);
  args.D = in.D, args.D_per_channel = in.D_per_channel;
  args.initial_states = in.initial_states;
  args.y_out = params.y;
  args.schedule = static_cast<Schedule>(plan.variant);
  args.tasks = at.tasks, args.prefixes = at.prefixes, args.segment_chunks = plan.segment_chunks;
  std::copy(plan.run_ends, plan.run_ends + kMaxRuns, args.run_ends);
  args.carry = at.carry, args.through_log2 = at.through_log2;

  if (at.word_count > 0) {
    if (int e = clear_words(at.words, at.word_count, stream)) return e;
    args.ticket = at.words, args.flags = at.words + 1;
  }
  args.pass_one = state_only;
  if (args.schedule == Schedule::segments && at.segments > 1) {
    args.pass_one = true;
    args.tasks = at.tasks / at.segments * (at.segments - 1);  // nothing follows the last one
    if (int e = fused_scan(args, in.dtype, gate, device.sm_count, stream)) return e;
    args.tasks = at.tasks, args.pass_one = false;
    args.carry_is_sum = at.segments > kFewSegments;
    if (args.carry_is_sum) {
      if (int e = segment_scan(args.carry, args.through_log2, at.segments, at.units,
                               padded_n(shape.n), stream))
        return e;
    }
  }
  args.final_states = static_cast<float*>(params.final_states);
  args.kept_states = params.chunk_states;
  if (int e = fused_scan(args, in.dtype, gate, device.sm_count, stream)) return e;
  if (params.log_decay) return any::segment_log_decay(in, params.log_decay, stream);
  if (!shape.packed) return 0;
  // Sequences without a token keep their initial state; rows outside all of them are zero.
  if (params.final_states) {
    if (int e = finish_empty_sequences(params, args.chunking, stream)) return e;
  }
  return zero_outside(params, args.chunking, stream);
}

}  // namespace mamba2::ssd::sm90
