// add_norm, backward: d_residual = d_residual_out + norm's gradient of residual_out, and dx the
// same, rounded. The norm's formulas are gated_rmsnorm's, without a gate; both of its sums over a
// row, of v^2 and of dy weight v, come from one reading.
//   add_norm_backward_rows  by teams of warps (add_norm.cuh). Bound by memory: residual_out, dy,
//                           d_residual_out once, d_residual and dx once
//   add_norm_backward_any   channel by channel, whatever the dtypes
// dweight: a thread's own channels over its rows, the teams of a block one after another in shared
// memory, the blocks by sum_parts. Bitwise repeatable.
#include "../core/sum_parts.h"
#include "add_norm.cuh"

namespace mamba2::add_norm {
namespace {

constexpr auto kNoGate = gated_rmsnorm::GateKind::none;
constexpr int kBlocksAnSm = 2;
constexpr int64_t kBlocks = kSms * kBlocksAnSm;

// Shared memory; behind it lie the weight and its gradient, (d) fp32 each.
struct alignas(16) Sums {
  float of[2 * 2 * kWarps];
};
constexpr std::size_t shared_bytes(int d) { return sizeof(Sums) + 2 * sizeof(float) * d; }

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksAnSm)
    add_norm_backward_rows(MAMBA2_GRID_CONSTANT const BackwardParams params, int warps,
                           int64_t rows, float* g_parts) {
  const Team team(warps, params.d);
  const int64_t first = blockIdx.x * rows;
  const int64_t last = first + rows < params.b ? first + rows : params.b;
  Sums& sums = *static_cast<Sums*>(ptx::dynamic_smem());
  float* s_weight = reinterpret_cast<float*>(&sums + 1);
  float* s_dweight = s_weight + params.d;
  for (int i = threadIdx.x; i < params.d; i += kThreads) {
    s_weight[i] = load<float>(params.weight, i);
  }
  __syncthreads();
  float dweight[kVectors][kVec] = {};
  int parity = 0;
  MAMBA2_NO_UNROLL
  for (int64_t begin = first; begin < last; begin += team.count(), parity ^= 1) {
    const int64_t row = begin + team.index, row_at = row * params.d;
    const bool here = row < last;
    Packed<float, kVec> residual[kVectors], passed[kVectors];
    Packed<T, kVec> dy[kVectors];
    team.load(static_cast<const float*>(params.residual_out) + row_at, here, residual);
    team.load(static_cast<const T*>(params.dy) + row_at, here, dy);
    team.load(static_cast<const float*>(params.d_residual_out) + row_at,
              here && params.d_residual_out, passed);
    float sum[2] = {0, 0};  // of v^2 and of dn v
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!team.has(v)) continue;
      float values[kVec], d[kVec], weight[kVec];
      load_vector(s_weight + team.at(v), weight);
      residual[v].unpack(values);
      dy[v].unpack(d);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) {
        sum[0] += values[c] * values[c];
        sum[1] += gated_rmsnorm::normed_gradient<kNoGate>(d[c], weight[c], 1.f) * values[c];
      }
    }
    sum_over_team(sum, sums.of, team, parity);
    if (!here) continue;
    const float r = inverse_rms(sum[0], params.d, params.eps);
    const float projection = sum[1] * r / static_cast<float>(params.d);
    float* g_d_residual = static_cast<float*>(params.d_residual) + row_at;
    T* g_dx = static_cast<T*>(params.dx) + row_at;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!team.has(v)) continue;
      float values[kVec], d[kVec], weight[kVec], sum_of_both[kVec];
      load_vector(s_weight + team.at(v), weight);
      residual[v].unpack(values);
      dy[v].unpack(d);
      passed[v].unpack(sum_of_both);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) {
        const auto g = gated_rmsnorm::gradients_of<kNoGate>(
            values[c], d[c], weight[c], gated_rmsnorm::Gate<float>{}, r, projection);
        sum_of_both[c] += g.dx;
        dweight[v][c] += g.dweight;
      }
      store_vector(g_d_residual + team.at(v), sum_of_both);
      if (params.dx) store_vector(g_dx + team.at(v), sum_of_both);
    }
  }
  for (int turn = 0; turn < team.count(); ++turn) {
    if (turn > 0) __syncthreads();
    if (turn != team.index) continue;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!team.has(v)) continue;
      if (turn > 0) {
        float before[kVec];
        load_vector(s_dweight + team.at(v), before);
        MAMBA2_UNROLL
        for (int c = 0; c < kVec; ++c) dweight[v][c] += before[c];
      }
      if (turn + 1 == team.count()) {
        store_vector(g_parts + int64_t(blockIdx.x) * params.d + team.at(v), dweight[v]);
        continue;
      }
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) s_dweight[team.at(v) + c] = dweight[v][c];
    }
  }
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    add_norm_backward_any(MAMBA2_GRID_CONSTANT const BackwardParams params, int64_t rows,
                          U* g_parts) {
  U* s_sums = static_cast<U*>(ptx::dynamic_smem());
  const int64_t first = blockIdx.x * rows;
  const int64_t last = first + rows < params.b ? first + rows : params.b;
  U* g_part = g_parts + int64_t(blockIdx.x) * params.d;
  const auto weight = [&](int i) { return load<U>(params.weight, i); };
  for (int64_t row = first; row < last; ++row) {
    const int64_t row_at = row * params.d;
    const auto at = [&](const void* ptr, DType dtype, int i) {
      return load<U>(AnyFloat{ptr, dtype}, row_at + i);
    };
    const auto residual = [&](int i) { return at(params.residual_out, params.residual_dtype, i); };
    const auto dy = [&](int i) { return at(params.dy, params.dtype, i); };
    U sum_of_squares = 0, sum_of_products = 0;
    for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
      const U v = residual(i);
      sum_of_squares += v * v;
      sum_of_products += gated_rmsnorm::normed_gradient<kNoGate>(dy(i), weight(i), U(1)) * v;
    }
    __syncthreads();  // the sums of the row before are read
    sum_of_squares = sum_over_block(sum_of_squares, s_sums);
    sum_of_products = sum_over_block(sum_of_products, s_sums + kAnyThreads / 32);
    const U r = inverse_rms(sum_of_squares, params.d, params.eps);
    const U projection = sum_of_products * r / U(params.d);
    for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
      const auto g = gated_rmsnorm::gradients_of<kNoGate>(residual(i), dy(i), weight(i),
                                                          gated_rmsnorm::Gate<U>{}, r, projection);
      U total = g.dx;
      if (params.d_residual_out) total += at(params.d_residual_out, params.residual_dtype, i);
      store(params.d_residual, params.residual_dtype, row_at + i, total);
      if (params.dx) store(params.dx, params.x_dtype, row_at + i, total);
      g_part[i] = row == first ? g.dweight : g_part[i] + g.dweight;
    }
  }
}

bool fits(const BackwardParams& params) {
  return params.residual_dtype == DType::f32 && params.dtype != DType::f64 &&
         params.weight.dtype != DType::f64 && (!params.dx || params.x_dtype == params.dtype) &&
         params.d % kVec == 0 && params.d <= kMaxChannels;
}

int64_t rows_of_block(const BackwardParams& params) { return rows_of_each(params.b, kBlocks); }
int64_t parts_of(const BackwardParams& params) { return ceil_div(params.b, rows_of_block(params)); }
DType accumulated(const BackwardParams& params) {
  return working_dtype(params.residual_dtype, params.weight.dtype);
}

int run_backward(const BackwardParams& params, void* parts, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(parts_of(params)));
  const int64_t rows = rows_of_block(params);
  if (fits(params)) {
    at.threads = kThreads;
    at.smem_bytes = shared_bytes(params.d);
    return with_row_type(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return launch(add_norm_backward_rows<T>, at, stream, params, warps_of_team(params.d), rows,
                    static_cast<float*>(parts));
    });
  }
  return with_accumulator(accumulated(params), [&](auto tag) {
    using U = typename decltype(tag)::type;
    at.threads = kAnyThreads;
    at.smem_bytes = 2 * sizeof(U) * kAnyThreads / 32;
    return launch(add_norm_backward_any<U>, at, stream, params, rows, static_cast<U*>(parts));
  });
}

}  // namespace

std::size_t backward_workspace_bytes(const BackwardParams& params) {
  return size_of(accumulated(params)) * static_cast<std::size_t>(parts_of(params)) * params.d;
}

int backward(const BackwardParams& params, void* workspace, void* stream) {
  if (const int error = run_backward(params, workspace, stream)) return error;
  SumPartsParams sum;
  sum.parts = workspace;
  sum.count = parts_of(params);
  sum.numel = sum.split = params.d;
  sum.first = params.dweight;
  sum.dtype = accumulated(params);
  return sum_parts(sum, stream);
}

}  // namespace mamba2::add_norm
