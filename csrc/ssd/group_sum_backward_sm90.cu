// group_sum (sm_90a backward): dB and dC of a chunk, added up over the slices of the group's heads
// in their order and rounded (of a single slice, only dC of the later block is left to add); dD of
// a chunk, added up over its blocks of tokens.
//
// grid: (chunks, groups and one more row for dD, 16 tokens each): a thread's loads are all on their
// way at once, however few chunks there are. Bound by HBM: 2 fp32 arrays (slices, tokens, g, n)
// read, dB and dC written.
#include "../core/launch.h"
#include "scan_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace {

constexpr int kThreads = 256, kTokens = 16;

MAMBA2_DEVICE void add(float4& sum, const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}
template <class T>
MAMBA2_DEVICE void store(const StridedOut& out, const Chunk& chunk, int row, int group, int column,
                         const float4& v) {
  const int64_t token = chunk.token + row;
  T* to = static_cast<T*>(out.ptr) + chunk.row * out.b + token * out.l + group * out.h + column;
  *reinterpret_cast<uint2*>(to) = uint2{pack2<T>(v.x, v.y), pack2<T>(v.z, v.w)};
}

// Of kTokens tokens.
template <class T>
MAMBA2_DEVICE void sum_slices(const BackwardArgs& args, const Chunk& chunk) {
  const int group = blockIdx.y, n = args.n;
  const int64_t groups = int64_t(args.chunks) * args.g;
  const int64_t here = int64_t(blockIdx.x) * args.g + group;
  const int first = args.dC_first() * n, begin = first + blockIdx.z * kTokens * n;
  const int end = min(chunk.count * n, begin + kTokens * n);
  for (int i = begin + threadIdx.x * 4; i < end; i += kThreads * 4) {
    const int row = i / n;
    float4 dB{}, dC{};
    MAMBA2_UNROLL
    for (int slice = 0; slice < args.slices; ++slice) {
      const int64_t at = slice * groups + here;
      if (!args.single_slice()) add(dB, args.dB_slices + at * kBackwardQ * n + i);
      add(dC, args.dC_slices + at * (kBackwardQ * n - first) + i - first);
      if (row >= kBlock) add(dC, args.dC_later + at * kBlock * n + i - kBlock * n);
    }
    if (!args.single_slice()) store<T>(args.dB, chunk, row, group, i % n, dB);
    store<T>(args.dC, chunk, row, group, i % n, dC);
  }
}

MAMBA2_DEVICE void sum_dD(const BackwardArgs& args, bool exists) {
  const int64_t width = int64_t(args.h) * args.dD_parts();
  const float* blocks = args.dD_blocks + blockIdx.x * 2 * width;
  if (args.D_per_channel) {
    const int channels = args.tensor_h * args.p;
    for (int i = threadIdx.x; i < channels; i += kThreads) {
      const int at = i / args.p * args.splits * kHeadDim + i % args.p;
      args.dD[int64_t(blockIdx.x) * channels + i] = exists ? blocks[at] + blocks[width + at] : 0.f;
    }
    return;
  }
  static_assert(kDParts % 4 == 0, "whole float4s");
  for (int head = threadIdx.x; head < args.tensor_h; head += kThreads) {
    double sum = 0;
    const int first = head * args.splits * kDParts, parts = exists ? args.splits * kDParts : 0;
    for (int i = first; i < first + parts; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(blocks + i);
      const float4 later = *reinterpret_cast<const float4*>(blocks + width + i);
      sum += double(v.x) + v.y + v.z + v.w + later.x + later.y + later.z + later.w;
    }
    args.dD[int64_t(blockIdx.x) * args.tensor_h + head] = static_cast<float>(sum);
  }
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 4)
    group_sum_kernel(const MAMBA2_GRID_CONSTANT BackwardArgs args) {
  // In this order: all that came before this kernel is complete when the next one begins.
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const Chunk chunk = args.chunking.at(blockIdx.x);
  if (int(blockIdx.y) == args.g) {
    if (blockIdx.z == 0) sum_dD(args, chunk.i_seq >= 0);
  } else if (chunk.i_seq >= 0) {
    sum_slices<T>(args, chunk);
  }
}

}  // namespace

int group_sum(const BackwardArgs& args, DType dtype, void* stream) {
  const Range range("group_sum");
  const unsigned pieces = (kBackwardQ - args.dC_first()) / kTokens;
  const LaunchShape at{dim3(args.chunks, args.g + (args.dD != nullptr), pieces), kThreads, 0, true};
  return dtype == DType::bf16 ? launch(group_sum_kernel<bf16>, at, stream, args)
                              : launch(group_sum_kernel<f16>, at, stream, args);
}

}  // namespace mamba2::ssd::sm90
