// add_norm, forward (see add_norm.h for the equation).
//   add_norm_rows  many rows, by teams of warps (add_norm.cuh). Bound by memory: residual and x
//                  once, residual_out and y once
//   add_norm_few   a block a row, whose sum of squares it makes: a thread has 4 consecutive
//                  channels, and more of them where d > 4096. Grid: rows. Shared memory: a sum a
//                  warp. Bound by the latency of one trip to memory
//   add_norm_any   channel by channel: dtypes other than an fp32 residual with x of y's type (and
//                  not fp64), and rows that are no whole number of 4 aligned channels
// Deterministic; a row's result does not depend on the others.
#include "add_norm.cuh"

namespace mamba2::add_norm {
namespace {

constexpr int kMaxThreads = 1024, kBlocksAnSm = 2;
constexpr int64_t kFewRows = 2048;  // up to here they fit the card at once

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksAnSm)
    add_norm_rows(MAMBA2_GRID_CONSTANT const ForwardParams params, int warps, int64_t rows) {
  const Team team(warps, params.d);
  const int64_t first = blockIdx.x * rows;
  const int64_t last = first + rows < params.b ? first + rows : params.b;
  float* s_sums = static_cast<float*>(ptx::dynamic_smem());
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  float weight[kVectors][kVec];
  team.load_weight(params.weight, weight);
  int parity = 0;
  MAMBA2_NO_UNROLL
  for (int64_t begin = first; begin < last; begin += team.count(), parity ^= 1) {
    const int64_t row = begin + team.index;
    const bool here = row < last;
    const float* g_residual =
        static_cast<const float*>(params.residual) + row * params.residual_stride;
    const T* g_x = static_cast<const T*>(params.x) + row * params.x_stride;
    Packed<float, kVec> residual[kVectors];
    Packed<T, kVec> x[kVectors];
    team.load(g_residual, here, residual);
    team.load(g_x, here && params.x, x);
    float values[kVectors][kVec], sum[1] = {0};
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float added[kVec];
      residual[v].unpack(values[v]);
      x[v].unpack(added);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) {
        values[v][c] += added[c];
        sum[0] += values[v][c] * values[v][c];
      }
    }
    sum_over_team(sum, s_sums, team, parity);
    if (!here) continue;
    const float r = inverse_rms(sum[0], params.d, params.eps);
    float* g_out = static_cast<float*>(params.residual_out) + row * params.residual_out_stride;
    T* g_y = static_cast<T*>(params.y) + row * params.d;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!team.has(v)) continue;
      if (params.x) store_vector(g_out + team.at(v), values[v]);
      float y[kVec];
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) y[c] = values[v][c] * (r * weight[v][c]);
      store_vector(g_y + team.at(v), y);
    }
  }
}

template <class T>
__global__ void MAMBA2_LAUNCH_BOUNDS(kMaxThreads, 1)
    add_norm_few(MAMBA2_GRID_CONSTANT const ForwardParams params) {
  float* s_sums = static_cast<float*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x;
  const float* g_residual =
      static_cast<const float*>(params.residual) + row * params.residual_stride;
  const T* g_x = static_cast<const T*>(params.x) + row * params.x_stride;
  float* g_out = static_cast<float*>(params.residual_out) + row * params.residual_out_stride;
  const float* g_sum = params.x ? g_out : g_residual;
  const int slab = static_cast<int>(blockDim.x) * kVec;
  const int first_k = static_cast<int>(threadIdx.x) * kVec;

  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  float v[kVec], sum = 0;
  MAMBA2_NO_UNROLL
  for (int k = first_k + (ceil_div(params.d, slab) - 1) * slab; k >= first_k; k -= slab) {
    if (k >= params.d) continue;  // backwards: the first stays in registers
    Packed<float, kVec> residual;
    Packed<T, kVec> x;
    residual.load(g_residual + k);
    if (params.x) x.load(g_x + k);
    residual.unpack(v);
    if (params.x) {
      float added[kVec];
      x.unpack(added);
      MAMBA2_UNROLL
      for (int c = 0; c < kVec; ++c) v[c] += added[c];
      store_vector(g_out + k, v);
    }
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) sum += v[c] * v[c];
  }
  const float r = inverse_rms(sum_over_block(sum, s_sums), params.d, params.eps);
  for (int k = first_k; k < params.d; k += slab) {
    if (k != first_k) load_vector(g_sum + k, v);
    float weight[kVec];
    load_vector(static_cast<const T*>(params.weight.ptr) + k, weight);
    MAMBA2_UNROLL
    for (int c = 0; c < kVec; ++c) v[c] *= r * weight[c];
    store_vector(static_cast<T*>(params.y) + row * params.d + k, v);
  }
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    add_norm_any(MAMBA2_GRID_CONSTANT const ForwardParams params) {
  U* s_sums = static_cast<U*>(ptx::dynamic_smem());
  const int64_t row = blockIdx.x, first = row * params.residual_stride;
  const int64_t first_out = row * params.residual_out_stride;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const auto total = [&](int i) {  // rounded to the residual's dtype
    return params.x ? load<U>(AnyFloat{params.residual_out, params.residual_dtype}, first_out + i)
                    : load<U>(AnyFloat{params.residual, params.residual_dtype}, first + i);
  };
  U sum = 0;
  for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
    if (params.x) {
      const U residual = load<U>(AnyFloat{params.residual, params.residual_dtype}, first + i);
      const U x = load<U>(AnyFloat{params.x, params.x_dtype}, row * params.x_stride + i);
      store(params.residual_out, params.residual_dtype, first_out + i, residual + x);
    }
    const U v = total(i);
    sum += v * v;
  }
  const U r = inverse_rms(sum_over_block(sum, s_sums), params.d, params.eps);
  for (int i = threadIdx.x; i < params.d; i += kAnyThreads) {
    const U y = total(i) * (r * load<U>(params.weight, i));
    store(params.y, params.dtype, row * params.d + i, y);
  }
}

bool fits(const ForwardParams& params) {
  const bool dtypes = params.residual_dtype == DType::f32 && params.dtype != DType::f64 &&
                      params.weight.dtype != DType::f64 &&
                      (!params.x || params.x_dtype == params.dtype);
  return dtypes && has_vectors(params.residual, params.residual_dtype, params.residual_stride) &&
         has_vectors(params.residual_out, params.residual_dtype, params.residual_out_stride) &&
         has_vectors(params.x, params.dtype, params.x_stride) &&
         has_vectors(params.y, params.dtype, params.d);
}
bool fits_few(const ForwardParams& params) {
  return fits(params) && params.b <= kFewRows && size_of(params.dtype) == 2 &&
         params.weight.dtype == params.dtype &&
         has_vectors(params.weight.ptr, params.dtype, params.d);
}

}  // namespace

int forward(const ForwardParams& params, void* stream) {
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(params.b));
  at.programmatic = true;
  if (fits_few(params)) {
    const int threads = round_up(ceil_div(params.d, kVec), 32);
    at.threads = threads < kMaxThreads ? threads : kMaxThreads;
    at.smem_bytes = sizeof(float) * at.threads / 32;
    return params.dtype == DType::bf16 ? launch(add_norm_few<bf16>, at, stream, params)
                                       : launch(add_norm_few<f16>, at, stream, params);
  }
  if (fits(params) && params.d <= kMaxChannels) {
    const int64_t rows = rows_of_each(params.b, kSms * kBlocksAnSm);
    at.grid = dim3(static_cast<unsigned>(ceil_div(params.b, rows)));
    at.threads = kThreads;
    at.smem_bytes = sizeof(float) * 2 * kWarps;
    return with_row_type(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return launch(add_norm_rows<T>, at, stream, params, warps_of_team(params.d), rows);
    });
  }
  return with_accumulator(working_dtype(params.residual_dtype, params.weight.dtype), [&](auto tag) {
    using U = typename decltype(tag)::type;
    at.threads = kAnyThreads;
    at.smem_bytes = sizeof(U) * kAnyThreads / 32;
    return launch(add_norm_any<U>, at, stream, params);
  });
}

}  // namespace mamba2::add_norm
