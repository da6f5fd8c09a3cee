// gated_rmsnorm, backward (formulas.cuh has the gradients, gated_rmsnorm.cuh the blocks). What the
// forward knew is formed again: both sums over a row, of v^2 and of dn v, come from one reading.
// dweight: a thread's own channels over the block's rows, the blocks' by sum_parts.
// Grid: groups of channels, the fastest, times runs of rows. Shared memory: sums, and two rows of
// x, dy and z. Bound by memory: x, z, dy once, dx, dz once; the parts are below 1% of that.
#include "../core/sum_parts.h"
#include "gated_rmsnorm.cuh"

namespace mamba2::gated_rmsnorm {
namespace {

template <class T, int kVectors, GateKind kGate>
__global__ void MAMBA2_LAUNCH_BOUNDS(max_threads(kVectors), min_blocks(kVectors))
    norm_backward(MAMBA2_GRID_CONSTANT const BackwardParams params, int rows_of_each,
                  float* g_parts) {
  using C = Columns<T, kVectors>;
  constexpr bool has_z = kGate != GateKind::none;
  enum Array { X, DY, Z, kArrays = has_z ? 3 : 2 };
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_of_each);
  const C columns{range.group * in.s, in.s};
  Sums<float>& sums = *static_cast<Sums<float>*>(ptx::dynamic_smem());
  const Ring<T, kVectors, kArrays> ring{reinterpret_cast<char*>(&sums + 1)};
  const float inverse_s = 1.f / static_cast<float>(in.s);
  RowCursor now(in, range.first), next = now;
  const auto load = [&](int64_t row) {
    if (row < range.last) {
      ring.load(row, X, in.x.ptr, next.at(in.x.b, in.x.l), columns);
      ring.load(row, DY, params.dy.ptr, next.at(params.dy.b, params.dy.l), columns);
      if (has_z) ring.load(row, Z, in.z.ptr, next.at(in.z.b, in.z.l), columns);
      next.advance(in);
    }
    ptx::cp_async_commit_group();
  };
  load(range.first);
  sums.clear_missing();
  float weight[kVectors][C::kVec], dweight[kVectors][C::kVec] = {};
  columns.load(in.weight, weight);
  MAMBA2_NO_UNROLL
  for (int64_t row = range.first; row < range.last; ++row) {
    load(row + 1);
    ptx::cp_async_wait_group<1>();
    float sigmoid[kVectors][C::kVec];  // of z
    float sum[2] = {0, 0};             // of v^2 and of dn v
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float x[C::kVec], dy[C::kVec], z[C::kVec] = {};
      ring.read(row, X, v, x);
      ring.read(row, DY, v, dy);
      if (has_z) ring.read(row, Z, v, z);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        sigmoid[v][c] = has_z ? fast::sigmoid(z[c]) : 1.f;
        const float gate = z[c] * sigmoid[v][c], normed = gated<kGate>(x[c], gate);
        sum[0] += normed * normed;
        sum[1] += normed_gradient<kGate>(dy[c], weight[v][c], gate) * normed;
      }
    }
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const float r = inverse_rms(sum[0], inverse_s, in), projection = sum[1] * r * inverse_s;
    T* g_dx = static_cast<T*>(params.dx.ptr) + now.at(params.dx.b, params.dx.l) + columns.first;
    T* g_dz = static_cast<T*>(params.dz.ptr) + now.at(params.dz.b, params.dz.l) + columns.first;
    now.advance(in);
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!columns.has(v)) continue;
      float x[C::kVec], dy[C::kVec], z[C::kVec] = {};
      ring.read(row, X, v, x);
      ring.read(row, DY, v, dy);
      if (has_z) ring.read(row, Z, v, z);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        const float s = sigmoid[v][c];
        const Gate<float> gate{z[c] * s, fast::silu_gradient(z[c], s)};
        const auto g = gradients_of<kGate>(x[c], dy[c], weight[v][c], gate, r, projection);
        x[c] = g.dx;
        z[c] = g.dz;
        dweight[v][c] += g.dweight;
      }
      store_vector(g_dx + columns.at(v), x);
      if (has_z) store_vector(g_dz + columns.at(v), z);
    }
  }
  float* part = g_parts + range.part * in.d + columns.first;
  MAMBA2_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (columns.has(v)) store_vector(part + columns.at(v), dweight[v]);
  }
}

template <class U, GateKind kGate>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    norm_backward_any(MAMBA2_GRID_CONSTANT const BackwardParams params, int rows_of_each,
                      U* g_parts) {
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_of_each);
  Sums<U>& sums = *static_cast<Sums<U>*>(ptx::dynamic_smem());
  sums.clear_missing();
  const int64_t first = int64_t(range.group) * in.s;
  U* part = g_parts + range.part * in.d + first;
  RowCursor cursor(in, range.first);
  for (int64_t row = range.first; row < range.last; ++row, cursor.advance(in)) {
    const auto at = [&](const Rows& rows, int i) {
      return load<U>(AnyFloat{rows.ptr, in.dtype}, cursor.at(rows.b, rows.l) + first + i);
    };
    const auto weight = [&](int i) { return load<U>(in.weight, first + i); };
    const auto gate = [&](int i) {
      if (kGate == GateKind::none) return Gate<U>{};
      const U z = at(in.z, i);
      return Gate<U>{fast::silu(z), fast::silu_gradient(z)};
    };
    U sum[2] = {0, 0};
    for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
      const U g = gate(i).value, v = gated<kGate>(at(in.x, i), g);
      sum[0] += v * v;
      sum[1] += normed_gradient<kGate>(at(params.dy, i), weight(i), g) * v;
    }
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const U inverse_s = U(1) / U(in.s), r = inverse_rms(sum[0], inverse_s, in);
    const U projection = sum[1] * r * inverse_s;
    for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
      const auto g =
          gradients_of<kGate>(at(in.x, i), at(params.dy, i), weight(i), gate(i), r, projection);
      const auto put = [&](const RowsOut& to, U v) {
        store(to.ptr, in.dtype, cursor.at(to.b, to.l) + first + i, v);
      };
      put(params.dx, g.dx);
      if (params.dz.ptr) put(params.dz, g.dz);
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
  at.threads = shape.threads ? shape.threads : kAnyThreads;
  return with_gate(in.z.ptr != nullptr, in.norm_before_gate, [&](auto gate) {
    if (shape.threads == 0) {
      return with_accumulator(in.dtype, [&](auto tag) {
        using U = typename decltype(tag)::type;
        at.smem_bytes = sizeof(Sums<U>);
        return launch(norm_backward_any<U, gate()>, at, stream, params, rows,
                      static_cast<U*>(parts));
      });
    }
    return with_vectors(in.dtype, shape.vectors, [&](auto tag, auto vectors) {
      using T = typename decltype(tag)::type;
      constexpr int kArrays = gate() == GateKind::none ? 2 : 3;
      at.smem_bytes = sizeof(Sums<float>) + Ring<T, vectors(), kArrays>::bytes(shape.threads);
      return launch(norm_backward<T, vectors(), gate()>, at, stream, params, rows,
                    static_cast<float*>(parts));
    });
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
