// gated_rmsnorm, forward (see gated_rmsnorm.h for the equation, gated_rmsnorm.cuh for the blocks).
// Grid: groups of channels, the fastest, times runs of rows. Shared memory: sums, and the group's
// weights in fp32. Bound by memory: x and z once, y once.
// fp64, rows that are no whole number of 16 bytes and groups of more than 4 x 352 vectors:
// norm_forward_any, element by element.
#include "gated_rmsnorm.cuh"

namespace mamba2::gated_rmsnorm {
namespace {

// A block's rows share one reading of the weights; few rows are spread over the card instead.
constexpr int kRowsPerBlock = 8;
constexpr int64_t kRowsForRuns = 8192;

template <class T, int kVectors>
__global__ void MAMBA2_LAUNCH_BOUNDS(max_threads(kVectors), min_blocks(kVectors))
    norm_forward(MAMBA2_GRID_CONSTANT const ForwardParams params, int rows_per_block) {
  using C = Columns<T, kVectors>;
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_per_block);
  const C columns{range.group * in.s, in.s};
  Sums<float>& sums = *static_cast<Sums<float>*>(ptx::dynamic_smem());
  float* s_weight = reinterpret_cast<float*>(&sums + 1);  // (s)
  const bool has_z = in.z.ptr != nullptr;

  typename C::Row next_x, next_z;
  const auto load = [&](int64_t row) {
    columns.load(in.x.ptr, at_row(in.x.b, in.x.l, in, row), next_x);
    if (has_z) columns.load(in.z.ptr, at_row(in.z.b, in.z.l, in, row), next_z);
  };
  load(range.first);
  columns.load_weights(in.weight, s_weight);
  MAMBA2_NO_UNROLL
  for (int64_t row = range.first; row < range.last; ++row) {
    float n[kVectors][C::kVec], outside[kVectors][C::kVec], sum[1] = {0};
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      next_x[v].unpack(n[v]);
      if (has_z) next_z[v].unpack(outside[v]);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        const float gate = has_z ? fast::silu(outside[v][c]) : 1.f;
        if (!in.norm_before_gate) n[v][c] *= gate;
        outside[v][c] = in.norm_before_gate ? gate : 1.f;
        sum[0] += n[v][c] * n[v][c];
      }
    }
    if (row + 1 < range.last) load(row + 1);
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const float r = inverse_rms(sum[0], in);
    T* g_y =
        static_cast<T*>(params.y.ptr) + at_row(params.y.b, params.y.l, in, row) + columns.first;
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!columns.has(v)) continue;
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        n[v][c] *= r * s_weight[columns.at(v) + c] * outside[v][c];
      }
      store_vector(g_y + columns.at(v), n[v]);
    }
  }
}

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    norm_forward_any(MAMBA2_GRID_CONSTANT const ForwardParams params) {
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, 1);
  Sums<U>& sums = *static_cast<Sums<U>*>(ptx::dynamic_smem());
  const int64_t row = range.first, first = int64_t(range.group) * in.s;
  const int64_t x_at = at_row(in.x.b, in.x.l, in, row) + first;
  const int64_t z_at = at_row(in.z.b, in.z.l, in, row) + first;
  const int64_t y_at = at_row(params.y.b, params.y.l, in, row) + first;
  const auto gate = [&](int i) {
    return gate_of_z(in, in.z.ptr ? load<U>(AnyFloat{in.z.ptr, in.dtype}, z_at + i) : U(0));
  };
  const auto x = [&](int i) { return load<U>(AnyFloat{in.x.ptr, in.dtype}, x_at + i); };
  U sum[1] = {0};
  for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
    const U v = x(i) * gate(i).inside;
    sum[0] += v * v;
  }
  sum_over_block(sum, sums, 0);
  const U r = inverse_rms(sum[0], in);
  for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
    const Gate<U> g = gate(i);
    const U y = x(i) * g.inside * r * load<U>(in.weight, first + i) * g.outside;
    store(params.y.ptr, in.dtype, y_at + i, y);
  }
}

}  // namespace

int forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.in;
  const int64_t rows = in.b * in.l, groups = in.d / in.s;
  const BlockShape shape = block_shape(in);
  LaunchShape at;
  if (shape.threads == 0) {
    at.grid = dim3(static_cast<unsigned>(rows * groups));
    at.threads = kAnyThreads;
    return with_accumulator(in.dtype, [&](auto tag) {
      using U = typename decltype(tag)::type;
      at.smem_bytes = sizeof(Sums<U>);
      return launch(norm_forward_any<U>, at, stream, params);
    });
  }
  const int rows_per_block = rows * groups >= kRowsForRuns ? kRowsPerBlock : 1;
  at.grid = dim3(static_cast<unsigned>(ceil_div(rows, rows_per_block) * groups));
  at.threads = shape.threads;
  at.smem_bytes = sizeof(Sums<float>) + sizeof(float) * in.s;
  return with_vectors(in.dtype, shape.vectors, [&](auto tag, auto vectors) {
    using T = typename decltype(tag)::type;
    return launch(norm_forward<T, vectors()>, at, stream, params, rows_per_block);
  });
}

}  // namespace mamba2::gated_rmsnorm
