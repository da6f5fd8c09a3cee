// Tier sm90, forward: chunk_cumsum, then fused_scan in one or two passes.
#include "../core/tensor_map.h"
#include "fused_scan_sm90.h"
#include "launch.h"
#include "plan_sm90.h"
#include "tiers.h"

namespace mamba2::ssd::sm90 {
namespace {

// Device memory of a forward, carved from the workspace.
struct Layout {
  std::size_t chunking, delta, a_cumsum, words, carry, through, total;
  int word_count, units, segments, tasks;
};

Layout layout_of(const Shape& shape, const Plan& plan) {
  Layout at{};
  const int64_t chunks = shape.chunks(kQ), rows = shape.nseq;
  const int64_t pairs = int64_t(shape.g) * ceil_div(shape.h / shape.g * (shape.p / kP), kUnits);
  const bool tickets = plan.variant == kTickets;
  const int64_t row_chunks = shape.packed ? chunks : chunks / (rows > 0 ? rows : 1);
  at.units = shape.h * (shape.p / kP);
  at.segments = int(ceil_div(tickets ? row_chunks : chunks, int64_t(plan.segment_chunks)));
  at.tasks = int((tickets ? rows : 1) * pairs * at.segments);
  at.word_count = int(1 + (tickets ? rows * at.units : 1));
  const int64_t slots = tickets ? (at.segments > 1 ? rows : 0) : at.segments;
  std::size_t next = 0;
  const auto take = [&](std::size_t bytes) {
    const std::size_t here = next;
    next += round_up(bytes, std::size_t(1024));
    return here;
  };
  at.chunking = take(chunking_bytes(shape, kQ));
  at.delta = take(sizeof(float) * chunks * shape.h * kQ);
  at.a_cumsum = take(sizeof(float) * chunks * shape.h * kQ);
  at.words = take(sizeof(int) * (1 + at.word_count));
  at.carry = take(sizeof(float) * slots * at.units * kP * shape.n);
  at.through = take(tickets ? 0 : sizeof(float) * at.segments * at.units);
  at.total = next;
  return at;
}

// (b, l, h or g, width) as a tensor map, innermost first; boxes of kQ tokens x 64 columns.
int map_of(ptx::TensorMap* map, DType dtype, const Shape& shape, const void* base, int64_t b,
           int64_t l, int64_t h, int heads, int width) {
  const int64_t size = int64_t(size_of(dtype));
  const int64_t dims[4] = {width, heads, shape.l, shape.b};
  const int64_t strides[3] = {h * size, l * size, b * size};
  const int box[4] = {tile::kPanelColumns, 1, kQ, 1};
  return make_tensor_map(map, dtype, base, 4, dims, strides, box, true);
}
template <class View>
int map_of(ptx::TensorMap* map, const Inputs& in, const View& t, int heads, int width) {
  return map_of(map, in.dtype, in.shape, t.ptr, t.b, t.l, t.h, heads, width);
}

int make_maps(const ForwardParams& params, FusedScanArgs* args) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  if (int e = map_of(&args->x, in, in.x, shape.h, shape.p)) return e;
  if (int e = map_of(&args->B, in, in.B, shape.g, shape.n)) return e;
  if (int e = map_of(&args->C, in, in.C ? in.C : in.B, shape.g, shape.n)) return e;
  if (int e = map_of(&args->z, in, in.z ? in.z : in.x, shape.h, shape.p)) return e;
  const Strided y{params.y.ptr, params.y.b, params.y.l, params.y.h};
  return map_of(&args->y, in, y.ptr ? y : in.x, shape.h, shape.p);
}

}  // namespace

std::size_t forward_workspace_bytes(const Problem& problem, const Plan& plan, const Device&) {
  return layout_of(problem.shape, plan).total;
}

int64_t chunk_states_numel(const Problem&, const Plan&) { return 0; }

int forward(const ForwardParams& params, const Plan& plan, const Device& device, void* workspace,
            void* stream) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const Layout at = layout_of(shape, plan);
  char* base = static_cast<char*>(workspace);
  float* delta = reinterpret_cast<float*>(base + at.delta);
  float* a_cumsum = reinterpret_cast<float*>(base + at.a_cumsum);
  int* words = reinterpret_cast<int*>(base + at.words);
  const bool tickets = plan.variant == kTickets;

  FusedScanArgs args{};
  if (int e = make_chunking(in, kQ, base + at.chunking, &args.chunking, stream)) return e;
  if (int e = chunk_cumsum(in, args.chunking, delta, a_cumsum, stream)) return e;
  if (int e = clear_words(words, at.word_count + 1, stream)) return e;
  if (int e = make_maps(params, &args)) return e;
  args.total_chunks = int(shape.chunks(kQ));
  args.rows = int(shape.nseq);
  args.h = shape.h, args.p = shape.p, args.g = shape.g, args.n = shape.n;
  args.set_units();
  args.delta = delta, args.a_cumsum_log2 = a_cumsum;
  args.D = in.D, args.D_per_channel = in.D_per_channel;
  args.initial_states = in.initial_states;
  args.final_states = static_cast<float*>(params.final_states);
  args.y_out = params.y;
  args.schedule = tickets ? Schedule::tickets : Schedule::segments;
  args.tasks = at.tasks, args.segment_chunks = plan.segment_chunks;
  args.ticket = words;
  args.flags = words + 2;
  args.carry = reinterpret_cast<float*>(base + at.carry);
  args.through_log2 = reinterpret_cast<float*>(base + at.through);

  const bool gate = static_cast<bool>(in.z);
  if (!tickets) {
    if (int e = fused_scan(args, in.dtype, gate, true, device.sm_count, stream)) return e;
    if (int e = segment_scan(args.carry, args.through_log2, at.segments, at.units, shape.n, stream))
      return e;
    args.ticket = words + 1;
  }
  if (int e = fused_scan(args, in.dtype, gate, false, device.sm_count, stream)) return e;
  if (!shape.packed) return 0;
  ZeroTargets outside;
  outside.add(params.y, shape.h, shape.p, in.dtype);
  return zero_outside(shape, args.chunking, outside, stream);
}

}  // namespace mamba2::ssd::sm90
