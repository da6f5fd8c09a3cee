// group_sum (sm_90a backward): dB and dC of a chunk, added up over the slices of the group's heads
// in their order and rounded (of a single slice there is nothing to add); dD of a chunk, added up
// over its blocks of tokens.
//
// grid: (chunks, pieces of the groups' tokens and one more for dD). Pieces are as many as the card
// holds at once, so that what comes next begins early, and each has all its loads on their way.
// Bound by HBM: parts (slices_backward_sm90.cuh) of 1280 bytes a token and slice at n = 128 read,
// dB and dC written.
#include "../core/launch.h"
#include "slices_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace {

constexpr int kThreads = 256, kSlicesAtOnce = 2;
constexpr int kLeastTokens = 8, kBlocksPerSm = 4;

// How the tokens of a group are cut.
struct Pieces {
  Divisor count;
  int tokens;  // of each
  int all;     // of all groups; none of a single slice
};

MAMBA2_DEVICE float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
MAMBA2_DEVICE void add(float4& sum, const float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}
template <class T>
MAMBA2_DEVICE void store(const StridedOut& out, const Chunk& chunk, int row, int group, int column,
                         const float4& v) {
  const int64_t token = chunk.token + row;
  T* to = static_cast<T*>(out.ptr) + chunk.row * out.b + token * out.l + group * out.h + column;
  *reinterpret_cast<uint2*>(to) = uint2{pack2<T>(v.x, v.y), pack2<T>(v.z, v.w)};
}

// Where the parts of a chunk and group are, where it takes a while to find out.
struct SharedParts {
  const float* of[kMostSharedSlices][2];  // by slice and block
};
// `i` is the chunk's place in the order of pairs.
MAMBA2_DEVICE void find_parts(const BackwardArgs& args, int i, int group, SharedParts& parts) {
  if (!args.shared_images) return;
  const int slice = threadIdx.x / 2, block = threadIdx.x % 2;
  if (slice < args.slices)
    parts.of[slice][block] = parts_of(args, i * args.slices + slice, group, block == 0);
  __syncthreads();
}

// A piece's tokens `first` and on, of all slices.
template <class T>
MAMBA2_DEVICE void sum_slices(const BackwardArgs& args, const SharedParts& parts,
                              const Chunk& chunk, int group, int first, int tokens) {
  const int n = args.n, end = min(chunk.count, first + tokens);
  const int column = threadIdx.x * 4 % n;
  for (int row = first + threadIdx.x * 4 / n; row < end; row += kThreads * 4 / n) {
    const int block = row / kBlock, tile = kBlock * n, at = row % kBlock * n + column;
    const auto of = [&](int slice, int block) -> const float* {
      if (args.shared_images) return parts.of[slice][block] + at;
      return parts_apart(args, int(blockIdx.x) * args.slices + slice, group, block == 0) + at;
    };
    float4 dB{}, dC{};
    MAMBA2_NO_UNROLL
    for (int slice = 0; slice < args.slices; slice += kSlicesAtOnce) {
      float4 r_dB[kSlicesAtOnce], r_dC[kSlicesAtOnce], later[kSlicesAtOnce];
      MAMBA2_UNROLL
      for (int k = 0; k < kSlicesAtOnce; ++k) {
        r_dB[k] = r_dC[k] = later[k] = float4{};
        if (slice + k >= args.slices) continue;
        const float* from = of(slice + k, block);
        r_dB[k] = load(from + kPart_dB * tile);
        r_dC[k] = load(from + kPart_dC * tile);
        if (block == 1) later[k] = load(of(slice + k, 0) + kPart_later_dC * tile);
      }
      MAMBA2_UNROLL
      for (int k = 0; k < kSlicesAtOnce; ++k) add(dB, r_dB[k]), add(dC, r_dC[k]), add(dC, later[k]);
    }
    store<T>(args.dB, chunk, row, group, column, dB);
    store<T>(args.dC, chunk, row, group, column, dC);
  }
}

MAMBA2_DEVICE void sum_dD_channels(const BackwardArgs& args, bool exists) {
  const float* earlier = args.dD_channels[0] + int64_t(blockIdx.x) * args.h * args.dD_apart[0];
  const float* later = args.dD_channels[1] + int64_t(blockIdx.x) * args.h * kHeadDim;
  const int channels = args.tensor_h * args.p;
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const int at = i / args.p * args.splits * kHeadDim + i % args.p;
    const float sum = earlier[at / kHeadDim * args.dD_apart[0] + at % kHeadDim] + later[at];
    args.dD[int64_t(blockIdx.x) * channels + i] = exists ? sum : 0.f;
  }
}
// Four parts a lane, four lanes a head: two of each block's.
MAMBA2_DEVICE void sum_dD_heads(const BackwardArgs& args, bool exists) {
  static_assert(kDParts == 8, "two float4s");
  constexpr int kLanes = 4;
  const int lane = threadIdx.x % kLanes;
  const int64_t width = int64_t(args.h) * kDParts;
  const float* parts = args.dD_blocks + (blockIdx.x * 2 + lane / 2) * width + lane % 2 * 4;
  for (int first = 0; first < args.tensor_h; first += kThreads / kLanes) {
    const int head = first + threadIdx.x / kLanes;
    const int splits = exists && head < args.tensor_h ? args.splits : 0;
    double sum = 0;
    for (int i = head * args.splits; i < head * args.splits + splits; ++i) {
      const float4 v = load(parts + i * kDParts);
      sum += double(v.x) + v.y + v.z + v.w;
    }
    MAMBA2_UNROLL
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0 && head < args.tensor_h)
      args.dD[int64_t(blockIdx.x) * args.tensor_h + head] = static_cast<float>(sum);
  }
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    group_sum_kernel(const MAMBA2_GRID_CONSTANT BackwardArgs args,
                     const MAMBA2_GRID_CONSTANT Pieces pieces) {
  auto& parts = *static_cast<SharedParts*>(ptx::dynamic_smem());
  const bool for_dD = int(blockIdx.y) == pieces.all;
  const Chunk chunk = args.chunking.at(for_dD ? int(blockIdx.x) : chunk_in_order(args, blockIdx.x));
  const int group = int(blockIdx.y) / pieces.count, piece = int(blockIdx.y) % pieces.count;
  const bool exists = chunk.i_seq >= 0;
  if (!for_dD && exists) find_parts(args, blockIdx.x, group, parts);
  // Behind the last pass comes delta_gradients, which lets this kernel begin when what was before
  // both is complete.
  if (!args.last_pass) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (for_dD) {
    args.D_per_channel ? sum_dD_channels(args, exists) : sum_dD_heads(args, exists);
  } else if (exists) {
    sum_slices<T>(args, parts, chunk, group, piece * pieces.tokens, pieces.tokens);
  }
  ptx::griddepcontrol_wait();  // what comes next waits for this kernel, and so for that one
}

}  // namespace

int group_sum(const BackwardArgs& args, DType dtype, void* stream) {
  const Range range("group_sum");
  int count = 1;
  while (kBackwardQ / count > kLeastTokens &&
         int64_t(args.chunks) * (2 * args.g * count + 1) <= kBlocksPerSm * args.sm_count)
    count *= 2;
  const Pieces pieces{Divisor(count), kBackwardQ / count, args.single_slice() ? 0 : args.g * count};
  const LaunchShape at{dim3(args.chunks, pieces.all + (args.dD != nullptr)), kThreads,
                       sizeof(SharedParts), true};
  return dtype == DType::bf16 ? launch(group_sum_kernel<bf16>, at, stream, args, pieces)
                              : launch(group_sum_kernel<f16>, at, stream, args, pieces);
}

}  // namespace mamba2::ssd::sm90
