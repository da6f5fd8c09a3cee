// Tier sm90, backward: chunk_cumsum, state_sweeps, chunk_scan_backward, delta_gradients, group_sum,
// sum_chunks (scan_backward_sm90.cuh says what each does). With z state_sweeps runs once for S and
// once, behind chunk_scan_gate_backward, for G. Workspace: mostly S and G of every chunk of 128
// tokens, in x's dtype: 2 x 64 n x 2 bytes a head, 335 MB each at b 8, l 4096, h 80, n 128 (G alone
// with states that the forward kept). z adds dy silu(z), as large as dy.
#include <algorithm>

#include "../core/search.h"
#include "../core/tensor_map.h"
#include "../core/workspace.h"
#include "delta_backward.h"
#include "launch.h"
#include "slices_backward_sm90.cuh"
#include "tiers.h"

namespace mamba2::ssd::sm90 {
namespace {

// The time of a block that does not depend on its heads (loading B and C, storing dB and dC), in
// heads.
constexpr int64_t kBlockOverheadHeads = 3;
// Where there are so many pairs of blocks an SM, or slices share images, all but the last ones have
// their blocks side by side.
constexpr int64_t kManyPairsPerSm = 6;
constexpr double kUnpairedPairsPerSm = 0.4;
// With batch_invariant: slices of so many heads, whatever else there is to fill the card with.
constexpr int kInvariantSliceHeads = 20;

// Heads of 64 channels in one of the tensors'.
int splits_of(const Shape& shape) { return ceil_div(shape.p, kHeadDim); }
// Passes over columns of the state, and how many of these one has.
constexpr int kMostPasses = 2, kMostColumns = 128;
int passes_of(const Shape& shape) { return ceil_div(shape.n, kMostColumns); }
int columns_of(const Shape& shape) { return std::min(shape.n, kMostColumns); }

// How many of these of a group one block takes: the split that keeps the card busy with few blocks.
int heads_per_slice(const Shape& shape, const Plan& plan, const Device& device) {
  const int heads = shape.heads_per_group() * splits_of(shape);
  if (plan.batch_invariant) return std::min(heads, kInvariantSliceHeads);
  const int64_t blocks = 2 * shape.chunks(kBackwardQ) * shape.g, sms = std::max(1, device.sm_count);
  const auto cost = [&](int64_t slices) {
    return ceil_div(blocks * slices, sms) * (ceil_div(heads, slices) + kBlockOverheadHeads);
  };
  return ceil_div(heads, int(cheapest(1, 2, heads + 1, cost)));
}

// How many of a slice's images others may write to, once they are read (slices_backward_sm90.cuh):
// none unless all slices have heads enough. All but kPairImages are those of unpaired blocks.
int shared_images(const Shape& shape, const BackwardArgs& args) {
  const int heads = shape.heads_per_group() * splits_of(shape);
  const int fewest = heads - (args.slices - 1) * args.heads_per_slice;
  if (args.slices == 1 || args.slices > kMostSharedSlices) return 0;
  return fewest > kUnpairedImages ? kUnpairedImages : fewest > kPairImages ? kPairImages : 0;
}

int unpaired_pairs(const Shape& shape, const BackwardArgs& args) {
  const int64_t pairs = shape.chunks(kBackwardQ) * args.slices;
  const int64_t few = int64_t(kUnpairedPairsPerSm * args.sm_count);
  if (args.shared_images) {
    const bool room = args.shared_images == kUnpairedImages;
    return room ? static_cast<int>(std::min(pairs / 2, few)) : 0;
  }
  const bool many = pairs * shape.g >= kManyPairsPerSm * args.sm_count;
  return static_cast<int>(many ? std::min(pairs, few) : pairs);
}

// What lies in the workspace; args points into it. With no memory behind it, it only counts.
struct Memory {
  void *chunk_table, *delta_backward, *d_y;
  float *delta, *a_cumsum_log2, *dD;
  int64_t progress, turns;  // counts of all passes, and of one
  Memory(const Problem& problem, BackwardArgs* args, Workspace& memory) {
    const Shape& shape = problem.shape;
    const int64_t chunks = shape.chunks(kBackwardQ), tensor_heads = chunks * shape.h;
    const int64_t heads = tensor_heads * splits_of(shape);
    const int64_t pairs = chunks * shape.g * args->slices;
    const int64_t images = heads * kHeadDim * columns_of(shape) * size_of(problem.dtype);
    const int passes = passes_of(shape);
    chunk_table = memory.take(chunking_bytes(shape, kBackwardQ));
    delta_backward = memory.take(delta_backward_workspace_bytes(chunks, shape.h));
    delta = memory.take_array<float>(tensor_heads * kBackwardQ);
    a_cumsum_log2 = memory.take_array<float>(tensor_heads * kBackwardQ);
    args->a_run_log2 = memory.take_array<float>(tensor_heads * kBackwardQ);
    args->rows_out = memory.take_array<float>(passes * heads * kBackwardQ);
    // The earlier half of a chunk's a_run_log2 is read by its earlier block alone, which has a
    // head's in shared memory before it leaves that head's later_rows. So these can lie there,
    // unless another pass or another of these kernels' heads is to read them as well.
    const bool in_decays = passes * splits_of(shape) == 1;
    args->later_apart = in_decays ? kBackwardQ : kBlock;
    args->later_rows =
        in_decays ? args->a_run_log2 : memory.take_array<float>(passes * heads * kBlock);
    args->columns = memory.take_array<float>(passes * heads * kBackwardQ);
    args->to_state = memory.take_array<float>(passes * heads * kBackwardQ);
    args->through = memory.take_array<float>(passes * heads);
    if (passes > 1) args->dx_sum = memory.take_array<float>(heads * kBackwardQ * kHeadDim);
    args->D_rows = memory.take_array<float>(int64_t(shape.h) * splits_of(shape) * kHeadDim);
    progress = 2 * passes * shape.nseq * shape.h * splits_of(shape);
    turns = args->single_slice()      ? chunks * shape.g * kTurns
            : args->shared_images > 0 ? 2 * pairs
                                      : 0;
    args->progress = memory.take_array<int>(progress + passes * turns);
    args->turns = args->progress ? args->progress + progress : nullptr;
    if (args->D_per_channel) {
      // Likewise the earlier block's part of dD in a_cumsum_log2, of which the sweeps are done with
      // a chunk before they have stored its state. The sum of both parts goes to the later one's
      // place where that is laid out alike.
      const bool in_place = shape.p == splits_of(shape) * kHeadDim;
      args->dD_apart[0] = in_decays ? kBackwardQ : kHeadDim;
      args->dD_apart[1] = kHeadDim;
      args->dD_channels[0] = in_decays ? a_cumsum_log2 : memory.take_array<float>(heads * kHeadDim);
      args->dD_channels[1] = memory.take_array<float>(heads * kHeadDim);
      dD = in_place ? args->dD_channels[1] : memory.take_array<float>(heads * kHeadDim);
    } else {
      args->dD_blocks = memory.take_array<float>(heads * 2 * kDParts);
      dD = memory.take_array<float>(heads);
    }
    const int64_t tile = kBlock * columns_of(shape);
    const int64_t parts = args->shared_images ? shape.g * kEarlierParts : pairs * kPairParts;
    args->parts = memory.take_array<float>(args->single_slice() ? 0 : parts * tile);
    args->dC_later = memory.take_array<float>(args->single_slice() ? pairs * tile : 0);
    // With z all passes' S at once, for the gate wants them so.
    args->states = memory.take(problem.save_states ? 0 : images * (problem.has_z ? passes : 1));
    args->d_states = memory.take(images);
    const int64_t ungated = problem.has_z ? shape.b * shape.l * shape.h * shape.p : 0;
    d_y = memory.take(ungated * size_of(problem.dtype));
  }
};

// What decides how much memory there must be.
void set_sizes(BackwardArgs* args, const Shape& shape, bool D_per_channel, const Plan& plan,
               const Device& device) {
  args->D_per_channel = D_per_channel;
  args->sm_count = std::max(1, device.sm_count);
  args->heads_per_slice = heads_per_slice(shape, plan, device);
  args->slices = ceil_div(shape.heads_per_group() * splits_of(shape), args->heads_per_slice);
  args->shared_images = shared_images(shape, *args);
  args->unpaired_pairs = unpaired_pairs(shape, *args);
}

// (b, l, h or g, width), innermost first; boxes of so many tokens x 64 columns.
int map_of(ptx::TensorMap* map, const Inputs& in, const Strided& tensor, int heads, int width,
           int tokens = kBlock) {
  const int64_t size = static_cast<int64_t>(size_of(in.dtype));
  const int64_t dims[4] = {width, heads, in.shape.l, in.shape.b};
  const int64_t strides[3] = {tensor.h * size, tensor.l * size, tensor.b * size};
  const int box[4] = {tile::kPanelColumns, 1, tokens, 1};
  return make_tensor_map(map, in.dtype, tensor.ptr, 4, dims, strides, box, true);
}

int make_maps(const Inputs& in, const Strided& dy, BackwardArgs* args) {
  const Shape& shape = in.shape;
  if (const int error = map_of(&args->x, in, in.x, shape.h, shape.p)) return error;
  if (const int error = map_of(&args->x_eights, in, in.x, shape.h, shape.p, 8)) return error;
  const Strided dx{args->dx.ptr, args->dx.b, args->dx.l, args->dx.h};
  if (const int error = map_of(&args->dx_tiles, in, dx, shape.h, shape.p)) return error;
  return map_of(&args->dy, in, dy, shape.h, shape.p);
}

void set_arguments(const BackwardParams& params, const Memory& memory, BackwardArgs* args) {
  const Inputs& in = params.in;
  args->chunks = static_cast<int>(in.shape.chunks(kBackwardQ));
  args->rows = static_cast<int>(in.shape.nseq);
  args->p = in.shape.p;
  args->tensor_h = in.shape.h;
  args->splits = splits_of(in.shape);
  args->h = args->tensor_h * args->splits;
  args->g = in.shape.g;
  args->n = columns_of(in.shape);
  args->tensor_n = in.shape.n;
  args->delta = memory.delta;
  args->a_cumsum_log2 = memory.a_cumsum_log2;
  args->seq_idx = in.seq_idx;
  args->D = in.D;
  args->initial_states = in.initial_states;
  args->d_final_states = static_cast<const float*>(params.d_final_states);
  args->d_initial_states = static_cast<float*>(params.d_initial_states);
  args->dx = params.dx;
  if (params.chunk_states) {
    args->states_kept = true;
    args->states = const_cast<void*>(params.chunk_states);  // which nothing writes then
  }
  args->dB = params.dB;
  args->dC = params.dC;
  args->dD = params.dD ? memory.dD : nullptr;
}

// The same from column `first` on, when there is such a tensor.
template <class Pointer>
Pointer from_column(Pointer of, int first, std::size_t size) {
  using Bytes =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return of ? reinterpret_cast<Pointer>(reinterpret_cast<Bytes*>(of) + first * size) : nullptr;
}

// What one pass over columns of the state is given.
int set_pass(const BackwardParams& params, int pass, bool states_of_all, int64_t turns,
             BackwardArgs* args) {
  const Inputs& in = params.in;
  const std::size_t size = size_of(in.dtype);
  const int first = pass * args->n;
  const int64_t heads = int64_t(args->chunks) * args->h, tokens = pass * heads * kBackwardQ;
  args->last_pass = pass + 1 == passes_of(in.shape);
  for (float** array : {&args->rows_out, &args->columns, &args->to_state}) *array += tokens;
  args->later_rows += pass * heads * args->later_apart;
  args->through += pass * heads;
  if (args->progress) args->progress += pass * 2 * int64_t(args->rows) * args->h;
  if (args->turns) args->turns += pass * turns;
  if (states_of_all) args->states = from_column(args->states, first, heads * kHeadDim * size);
  args->initial_states.ptr =
      from_column(args->initial_states.ptr, first, size_of(args->initial_states.dtype));
  args->d_final_states = from_column(args->d_final_states, first, sizeof(float));
  args->d_initial_states = from_column(args->d_initial_states, first, sizeof(float));
  args->dB.ptr = from_column(args->dB.ptr, first, size);
  args->dC.ptr = from_column(args->dC.ptr, first, size);
  Strided B = in.B, C = in.C;
  B.ptr = from_column(B.ptr, first, size);
  C.ptr = from_column(C.ptr, first, size);
  if (const int error = map_of(&args->B, in, B, in.shape.g, args->n)) return error;
  if (const int error = map_of(&args->B_eights, in, B, in.shape.g, args->n, 8)) return error;
  return map_of(&args->C, in, C, in.shape.g, args->n);
}

DeltaGradientParts parts_of(const BackwardArgs& args, int passes) {
  DeltaGradientParts parts;
  parts.delta = args.delta;
  parts.rows = args.rows_out;
  parts.columns = args.columns;
  parts.from_state = args.later_rows;
  parts.from_state_first = kBlock;
  parts.from_state_apart = args.later_apart;
  parts.to_state = args.to_state;
  parts.through = args.through;
  parts.dD = args.dD;
  parts.head_parts = args.splits;
  parts.passes = passes;
  parts.programmatic = true;
  parts.dD_width = args.D_per_channel ? args.tensor_h * args.p : args.tensor_h;
  return parts;
}

// dz, and dy becomes the gradient of the output before the gate. It wants S; G waits for it.
int pass_gate(const BackwardParams& params, const Memory& memory, const BackwardArgs* passes,
              const StridedOut& d_y, const Device& device, void* stream) {
  const Inputs& in = params.in;
  for (int i = 0; i < passes_of(in.shape) && !passes->states_kept; ++i) {
    if (const int error = state_sweeps(passes[i], Sweeps::states, in.dtype, stream)) return error;
  }
  const sm80::GateBackward gate{params.dy, params.dz, d_y, passes->n};
  return sm80::chunk_scan_gate_backward(in, gate, passes->chunking, memory.delta,
                                        memory.a_cumsum_log2, passes->states, device, stream);
}

}  // namespace

std::size_t backward_workspace_bytes(const Problem& problem, const Plan& plan,
                                     const Device& device) {
  BackwardArgs args{};
  set_sizes(&args, problem.shape, problem.D_per_channel, plan, device);
  Workspace counted;
  Memory(problem, &args, counted);
  return counted.bytes();
}

int backward(const BackwardParams& params, const Plan& plan, const Device& device, void* workspace,
             void* stream) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  BackwardArgs args{};
  set_sizes(&args, shape, in.D_per_channel, plan, device);
  Workspace carved(workspace);
  Problem sizes;
  sizes.shape = shape;
  sizes.dtype = in.dtype;
  sizes.has_z = static_cast<bool>(in.z);
  sizes.save_states = params.chunk_states != nullptr;
  const Memory memory(sizes, &args, carved);
  set_arguments(params, memory, &args);
  const StridedOut d_y = sm80::contiguous(memory.d_y, shape);
  const Strided dy = in.z ? Strided{d_y.ptr, d_y.b, d_y.l, d_y.h} : params.dy;
  if (const int error = make_maps(in, dy, &args)) return error;
  if (const int error = make_chunking(in, kBackwardQ, memory.chunk_table, &args.chunking, stream)) {
    return error;
  }
  const Sweeps sweeps = sizes.has_z || sizes.save_states ? Sweeps::gradients : Sweeps::both;
  const int count = passes_of(shape);
  ZeroCounts counts{args.turns, count * memory.turns};
  const Beside beside = beside_sweeps(args, sweeps);
  args.from_middle = beside == Beside::from_middle;
  if (beside == Beside::none)
    args.progress = nullptr;
  else
    counts = {args.progress, memory.progress + counts.count};
  BackwardArgs passes[kMostPasses] = {args, args};
  for (int i = 0; i < count; ++i) {
    if (const int error = set_pass(params, i, sizes.has_z, memory.turns, passes + i)) return error;
  }
  if (const int error = chunk_cumsum(in, args.chunking, memory.delta, memory.a_cumsum_log2, stream,
                                     nullptr, args.a_run_log2, counts)) {
    return error;
  }
  if (sizes.has_z) {
    if (const int error = pass_gate(params, memory, passes, d_y, device, stream)) return error;
  }
  const DeltaGradientParts parts = parts_of(args, count);
  for (int i = 0; i < count; ++i) {
    if (const int error = state_sweeps(passes[i], sweeps, in.dtype, stream)) return error;
    if (const int error = chunk_scan_backward(passes[i], in.dtype, stream)) return error;
    if (passes[i].last_pass) {
      if (const int error = delta_gradients(params, parts, args.chunking, args.chunks,
                                            memory.delta_backward, stream)) {
        return error;
      }
    }
    if (const int error = group_sum(passes[i], in.dtype, stream)) return error;
  }
  if (const int error = sum_chunks(params, parts, args.chunks, memory.delta_backward, stream)) {
    return error;
  }
  return zero_outside(params, args.chunking, stream);
}

}  // namespace mamba2::ssd::sm90
