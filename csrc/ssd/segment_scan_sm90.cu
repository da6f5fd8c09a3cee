// segment_scan: S_in[k + 1] = 2^through[k] S_in[k] + added[k], over the segments k of all
// sequences. (A segment in which a sequence starts lets nothing through.) One thread holds four
// elements of one unit's state and walks the segments; the loads of kAhead segments are in flight
// at once. Bytes: 8 a state element and segment.
#include "../core/launch.h"
#include "../ptx/common.cuh"
#include "fused_scan_sm90.h"

namespace mamba2::ssd::sm90 {
namespace {

constexpr int kScanThreads = 256, kAhead = 8;

MAMBA2_DEVICE float4 scaled_sum(float w, float4 a, float4 b) {
  return make_float4(fmaf(w, a.x, b.x), fmaf(w, a.y, b.y), fmaf(w, a.z, b.z), fmaf(w, a.w, b.w));
}

// grid: (state elements / 4 / kScanThreads, units)
__global__ void MAMBA2_LAUNCH_BOUNDS(kScanThreads, 4)
    segment_scan_kernel(float* carry, const float* through_log2, int segments, int units,
                        int elements) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int unit = blockIdx.y;
  const int64_t stride = int64_t(units) * elements;
  float* at = carry + int64_t(unit) * elements + (blockIdx.x * kScanThreads + threadIdx.x) * 4;
  float4 state = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int k0 = 0; k0 < segments; k0 += kAhead) {
    float4 added[kAhead];
    float through[kAhead];
    MAMBA2_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + i < segments - 1 ? k0 + i : segments - 2;  // nothing follows the last one
      added[i] = *reinterpret_cast<const float4*>(at + k * stride);
      through[i] = through_log2[int64_t(k) * units + unit];
    }
    MAMBA2_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (k0 + i >= segments) break;
      *reinterpret_cast<float4*>(at + (k0 + i) * stride) = state;
      state = scaled_sum(ptx::ex2(through[i]), state, added[i]);
    }
  }
}

// grid: (elements of a sequence's states / kScanThreads, sequences)
__global__ void finish_empty_kernel(Chunking chunking, AnyFloat initial_states, float* final_states,
                                    int64_t elements) {
  if (chunking.count(blockIdx.y) > 0) return;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= elements) return;
  const int64_t at = blockIdx.y * elements + i;
  final_states[at] = initial_states.ptr ? load<float>(initial_states, at) : 0.f;
}

}  // namespace

int finish_empty_sequences(const ForwardParams& params, const Chunking& chunking, void* stream) {
  const Shape& shape = params.in.shape;
  const int64_t elements = int64_t(shape.h) * shape.p * shape.n;
  LaunchShape at;
  at.grid = dim3(unsigned(ceil_div(elements, kScanThreads)), unsigned(shape.nseq));
  at.threads = kScanThreads;
  return launch(finish_empty_kernel, at, stream, chunking, params.in.initial_states,
                static_cast<float*>(params.final_states), elements);
}

int segment_scan(float* carry, const float* through_log2, int segments, int units, int n,
                 void* stream) {
  const Range range("segment_scan");
  LaunchShape at;
  const int elements = kP * n;
  at.grid = dim3(elements / 4 / kScanThreads, units);
  at.threads = kScanThreads;
  at.programmatic = true;
  return launch(segment_scan_kernel, at, stream, carry, through_log2, segments, units, elements);
}

}  // namespace mamba2::ssd::sm90
