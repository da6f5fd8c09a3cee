// cross_entropy (see cross_entropy.h for the equation): a block a row, read twice: for the greatest
// logit and the sum of exponentials, both found in one pass, and for the gradient. The second time
// the row is in the L2: blocks on the card at once hold no more of it.
// Grid: rows. Shared memory: a maximum and a sum a warp. Bound by memory: logits once, the gradient
// once. Rows that are no whole number of 16 bytes: the same, element by element.
// Deterministic; a row's result does not depend on the others.
#include "cross_entropy.h"

#include <algorithm>

#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "../ssd/formulas.cuh"

namespace mamba2::cross_entropy {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocksPerSm = 2;
// Vectors a thread has on their way.
template <class T>
constexpr int kAtOnce = 8 / static_cast<int>(sizeof(T));
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

MAMBA2_DEVICE float exp_of(float v) { return ptx::ex2(v * static_cast<float>(ssd::kLog2E)); }
MAMBA2_DEVICE double exp_of(double v) { return exp(v); }
MAMBA2_DEVICE float log_of(float v) { return logf(v); }
MAMBA2_DEVICE double log_of(double v) { return log(v); }
MAMBA2_DEVICE float greater(float a, float b) { return fmaxf(a, b); }
MAMBA2_DEVICE double greater(double a, double b) { return fmax(a, b); }

// sum exp(v - greatest) over the elements seen.
template <class U>
struct ExpSum {
  U greatest = U(-3.4e38);  // finite: the difference of two of them is a number
  U sum = 0;

  template <int kCount>
  MAMBA2_DEVICE void add(const U (&v)[kCount]) {
    U most = greatest;
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) most = greater(most, v[i]);
    sum *= exp_of(greatest - most);
    greatest = most;
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) sum += exp_of(v[i] - most);
  }
  MAMBA2_DEVICE void add(const ExpSum& other) {
    const U most = greater(greatest, other.greatest);
    sum = sum * exp_of(greatest - most) + other.sum * exp_of(other.greatest - most);
    greatest = most;
  }
};

// Over the block, in a fixed order. s_warps: one a warp.
template <class U>
MAMBA2_DEVICE ExpSum<U> sum_over_block(ExpSum<U> mine, ExpSum<U>* s_warps) {
  MAMBA2_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    ExpSum<U> other;
    other.greatest = __shfl_xor_sync(kAllLanes, mine.greatest, step);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, step);
    // Both lanes of a pair add in the same order: their sums are to have the same bits.
    const bool upper = threadIdx.x & step;
    ExpSum<U> all = upper ? other : mine;
    all.add(upper ? mine : other);
    mine = all;
  }
  if (threadIdx.x % 32 == 0) s_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  ExpSum<U> all;
  MAMBA2_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) all.add(s_warps[warp]);
  return all;
}

template <class T, int kVec>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    cross_entropy_rows(MAMBA2_GRID_CONSTANT const Params params) {
  using U = Accumulator<T>;
  constexpr int kStep = kThreads * kVec;
  auto* s_warps = static_cast<ExpSum<U>*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x, target = params.targets[row];
  const bool counts = target != kIgnored, exists = target >= 0 && target < params.vocab;
  T* g_row = static_cast<T*>(params.logits) + row * params.stride;
  const T* g_target = g_row + (exists ? target : 0);
  const U at_target = convert<U>(*g_target);
  const int first = static_cast<int>(threadIdx.x) * kVec, vocab = params.vocab;

  // f(element, values) for all of this thread's vectors, several on their way at a time.
  const auto each_vector = [&](auto f) {
    for (int k = first; k < vocab; k += kAtOnce<T> * kStep) {
      Packed<T, kVec> packed[kAtOnce<T>];
      MAMBA2_UNROLL
      for (int i = 0; i < kAtOnce<T>; ++i)
        if (k + i * kStep < vocab) packed[i].load(g_row + k + i * kStep);
      MAMBA2_UNROLL
      for (int i = 0; i < kAtOnce<T>; ++i) {
        if (k + i * kStep < vocab) {
          U v[kVec];
          packed[i].unpack(v);
          f(k + i * kStep, v);
        }
      }
    }
  };
  ExpSum<U> mine;
  if (counts) each_vector([&](int, const U(&v)[kVec]) { mine.add(v); });
  const ExpSum<U> all = sum_over_block(mine, s_warps);
  const U bad = U(0) / U(0);  // a target that is no row of the vocabulary
  if (threadIdx.x == 0) {
    const U loss = exists ? log_of(all.sum) + (all.greatest - at_target) : bad;
    static_cast<U*>(params.losses)[row] = counts ? loss : U(0);
  }
  if (!params.scale) return;
  const U scale = !counts ? U(0) : exists ? *static_cast<const U*>(params.scale) : bad;
  const U share = scale / all.sum;
  each_vector([&](int k, U(&v)[kVec]) {
    MAMBA2_UNROLL
    for (int i = 0; i < kVec; ++i) v[i] = counts ? exp_of(v[i] - all.greatest) * share : U(0);
    store_vector(g_row + k, v);
  });
  if (!exists) return;
  __syncthreads();
  if (threadIdx.x == 0)
    g_row[target] = convert<T>(exp_of(at_target - all.greatest) * share - scale);
}

template <class T, int kVec>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    scale_gradient(MAMBA2_GRID_CONSTANT const ScaleParams params) {
  using U = Accumulator<T>;
  const U factor = *static_cast<const U*>(params.factor);
  if (factor == U(1)) return;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  T* gradient = static_cast<T*>(params.gradient);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < params.numel / kVec;
       i += threads) {
    U v[kVec];
    load_vector(gradient + i * kVec, v);
    MAMBA2_UNROLL
    for (U& element : v) element *= factor;
    store_vector(gradient + i * kVec, v);
  }
}

template <class T>
constexpr int kWidest = kVectorBytes / static_cast<int>(sizeof(T));

bool whole(const void* ptr, int64_t elements, DType dtype) {
  return reinterpret_cast<uintptr_t>(ptr) % kVectorBytes == 0 &&
         elements * int64_t(size_of(dtype)) % kVectorBytes == 0;
}
// f(TypeTag<T>{}, elements of an access), both known at compile time.
template <class F>
int with_access(DType dtype, bool wide, F f) {
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (wide) return f(tag, std::integral_constant<int, kWidest<T>>{});
    return f(tag, std::integral_constant<int, 1>{});
  });
}

}  // namespace

int run(const Params& params, void* stream) {
  const bool wide = whole(params.logits, params.vocab, params.dtype) &&
                    whole(nullptr, params.stride, params.dtype);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(params.rows));
  at.threads = kThreads;
  return with_access(params.dtype, wide, [&](auto tag, auto elements) {
    using T = typename decltype(tag)::type;
    at.smem_bytes = sizeof(ExpSum<Accumulator<T>>) * kWarps;
    return launch(cross_entropy_rows<T, elements()>, at, stream, params);
  });
}

int scale(const ScaleParams& params, void* stream) {
  constexpr int64_t kMostBlocks = 1024;
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(std::min(kMostBlocks, ceil_div(params.numel, kThreads))));
  at.threads = kThreads;
  const bool wide = whole(params.gradient, params.numel, params.dtype);
  return with_access(params.dtype, wide, [&](auto tag, auto elements) {
    using T = typename decltype(tag)::type;
    return launch(scale_gradient<T, elements()>, at, stream, params);
  });
}

}  // namespace mamba2::cross_entropy
