// gated_rmsnorm, backward (formulas.cuh has the gradients, gated_rmsnorm.cuh the blocks). What the
// forward knew is formed again: both sums over a row, of v^2 and of dn v, come from one reading.
// dweight: a thread's own channels over the block's rows in shared memory (in registers they would
// leave room for one block an SM), the blocks' by sum_parts.
// Grid: groups of channels, the fastest, times runs of rows. Shared memory: sums, weights, dweight.
// Bound by memory: x, z, dy once, dx, dz once; the parts are below 3% of that.
#include "../core/sum_parts.h"
#include "gated_rmsnorm.cuh"

namespace mamba2::gated_rmsnorm {
namespace {

constexpr int kMostRowsPerBlock = 32;  // more rows: fewer parts of dweight, and fewer blocks
constexpr int64_t kEnoughBlocks = 528;

int rows_per_block(const Inputs& in) {
  const int64_t rows = in.b * in.l * (in.d / in.s);
  const int64_t wanted = ceil_div(rows, kEnoughBlocks);
  return static_cast<int>(wanted < kMostRowsPerBlock ? wanted : kMostRowsPerBlock);
}
int64_t parts_of(const Inputs& in) { return ceil_div(in.b * in.l, rows_per_block(in)); }

// Where the gate is, at compile time: by selects it would cost more than the rest.
enum class GateKind { none, inside, outside };

template <class T, int kVectors, GateKind kGate>
__global__ void MAMBA2_LAUNCH_BOUNDS(max_threads(kVectors), min_blocks(kVectors))
    norm_backward(MAMBA2_GRID_CONSTANT const BackwardParams params, int rows_of_each,
                  float* g_parts) {
  using C = Columns<T, kVectors>;
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_of_each);
  const C columns{range.group * in.s, in.s};
  Sums<float>& sums = *static_cast<Sums<float>*>(ptx::dynamic_smem());
  float* s_weight = reinterpret_cast<float*>(&sums + 1);  // (s)
  float* s_dweight = s_weight + in.s;                     // (s), each thread's own, as the weights
  constexpr bool has_z = kGate != GateKind::none;

  typename C::Row next_x, next_z, next_dy;
  const auto load = [&](int64_t row) {
    columns.load(in.x.ptr, at_row(in.x.b, in.x.l, in, row), next_x);
    if (has_z) columns.load(in.z.ptr, at_row(in.z.b, in.z.l, in, row), next_z);
    columns.load(params.dy.ptr, at_row(params.dy.b, params.dy.l, in, row), next_dy);
  };
  load(range.first);
  columns.load_weights(in.weight, s_weight);
  for (int v = 0; v < kVectors; ++v) {
    if (!columns.has(v)) continue;
    for (int c = 0; c < C::kVec; ++c) s_dweight[columns.at(v) + c] = 0;
  }
  MAMBA2_NO_UNROLL
  for (int64_t row = range.first; row < range.last; ++row) {
    Packed<T, C::kVec> now_x[kVectors], now_z[kVectors], now_dy[kVectors];
    float sum[2] = {0, 0};  // of v^2 and of dn v
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      now_x[v] = next_x[v];
      now_dy[v] = next_dy[v];
      if (has_z) now_z[v] = next_z[v];
      float x[C::kVec], z[C::kVec] = {}, dy[C::kVec];
      now_x[v].unpack(x);
      now_dy[v].unpack(dy);
      if (has_z) now_z[v].unpack(z);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        const float weight = columns.has(v) ? s_weight[columns.at(v) + c] : 0.f;
        const float gated = has_z ? x[c] * fast::silu(z[c]) : x[c];
        const float n = kGate == GateKind::outside ? x[c] : gated;
        sum[0] += n * n;
        sum[1] += dy[c] * weight * gated;  // the gate is in dn, or in v
      }
    }
    if (row + 1 < range.last) load(row + 1);
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const float r = inverse_rms(sum[0], in), projection = sum[1] * r / in.s;
    T* g_dx = static_cast<T*>(params.dx.ptr) + at_row(params.dx.b, params.dx.l, in, row);
    T* g_dz = static_cast<T*>(params.dz.ptr) + at_row(params.dz.b, params.dz.l, in, row);
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!columns.has(v)) continue;
      float x[C::kVec], z[C::kVec] = {}, dy[C::kVec];
      now_x[v].unpack(x);
      now_dy[v].unpack(dy);
      if (has_z) now_z[v].unpack(z);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        const Gate<float> gate =
            gate_of(fast::silu(z[c]), fast::silu_gradient(z[c]), has_z, kGate == GateKind::outside);
        const float weight = s_weight[columns.at(v) + c];
        const auto g = gradients_of(x[c], dy[c], weight, gate, r, projection);
        x[c] = g.dx;
        z[c] = g.dz;
        s_dweight[columns.at(v) + c] += g.dweight;
      }
      store_vector(g_dx + columns.first + columns.at(v), x);
      if (has_z) store_vector(g_dz + columns.first + columns.at(v), z);
    }
  }
  float* part = g_parts + range.part * in.d + columns.first;
  for (int v = 0; v < kVectors; ++v) {
    if (!columns.has(v)) continue;
    for (int c = 0; c < C::kVec; ++c) part[columns.at(v) + c] = s_dweight[columns.at(v) + c];
  }
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    norm_backward_any(MAMBA2_GRID_CONSTANT const BackwardParams params, int rows_of_each,
                      U* g_parts) {
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_of_each);
  Sums<U>& sums = *static_cast<Sums<U>*>(ptx::dynamic_smem());
  const int64_t first = int64_t(range.group) * in.s;
  U* part = g_parts + range.part * in.d + first;
  for (int64_t row = range.first; row < range.last; ++row) {
    const int64_t x_at = at_row(in.x.b, in.x.l, in, row) + first;
    const int64_t z_at = at_row(in.z.b, in.z.l, in, row) + first;
    const int64_t dy_at = at_row(params.dy.b, params.dy.l, in, row) + first;
    const auto at = [&](const void* ptr, int64_t i) { return load<U>(AnyFloat{ptr, in.dtype}, i); };
    const auto gate = [&](int i) {
      return gate_of_z(in, in.z.ptr ? at(in.z.ptr, z_at + i) : U(0));
    };
    U sum[2] = {0, 0};
    for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
      const Gate<U> g = gate(i);
      const U v = at(in.x.ptr, x_at + i) * g.inside;
      sum[0] += v * v;
      sum[1] += at(params.dy.ptr, dy_at + i) * g.outside * load<U>(in.weight, first + i) * v;
    }
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const U r = inverse_rms(sum[0], in), projection = sum[1] * r / U(in.s);
    for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
      const auto g = gradients_of(at(in.x.ptr, x_at + i), at(params.dy.ptr, dy_at + i),
                                  load<U>(in.weight, first + i), gate(i), r, projection);
      const int64_t dx_at = at_row(params.dx.b, params.dx.l, in, row) + first;
      const int64_t dz_at = at_row(params.dz.b, params.dz.l, in, row) + first;
      store(params.dx.ptr, in.dtype, dx_at + i, g.dx);
      if (params.dz.ptr) store(params.dz.ptr, in.dtype, dz_at + i, g.dz);
      part[i] = row == range.first ? g.dweight : part[i] + g.dweight;
    }
  }
}

int run_backward(const BackwardParams& params, void* parts, void* stream) {
  const Inputs& in = params.in;
  const BlockShape shape = block_shape(in);
  const int rows = rows_per_block(in);
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(parts_of(in) * (in.d / in.s)));
  if (shape.threads == 0) {
    at.threads = kAnyThreads;
    return with_accumulator(in.dtype, [&](auto tag) {
      using U = typename decltype(tag)::type;
      at.smem_bytes = sizeof(Sums<U>);
      return launch(norm_backward_any<U>, at, stream, params, rows, static_cast<U*>(parts));
    });
  }
  at.threads = shape.threads;
  at.smem_bytes = sizeof(Sums<float>) + 2 * sizeof(float) * in.s;
  return with_vectors(in.dtype, shape.vectors, [&](auto tag, auto vectors) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto gate) {
      return launch(norm_backward<T, vectors(), gate()>, at, stream, params, rows,
                    static_cast<float*>(parts));
    };
    if (!in.z.ptr) return run(std::integral_constant<GateKind, GateKind::none>{});
    if (in.norm_before_gate) return run(std::integral_constant<GateKind, GateKind::outside>{});
    return run(std::integral_constant<GateKind, GateKind::inside>{});
  });
}

}  // namespace

std::size_t backward_workspace_bytes(const Inputs& in) {
  return (in.dtype == DType::f64 ? 8 : 4) * static_cast<std::size_t>(parts_of(in)) * in.d;
}

int backward(const BackwardParams& params, void* workspace, void* stream) {
  if (const int error = run_backward(params, workspace, stream)) return error;
  SumPartsParams sum;
  sum.parts = workspace;
  sum.count = parts_of(params.in);
  sum.numel = sum.split = params.in.d;
  sum.first = params.dweight;
  sum.dtype = params.in.dtype == DType::f64 ? DType::f64 : DType::f32;
  return sum_parts(sum, stream);
}

}  // namespace mamba2::gated_rmsnorm
