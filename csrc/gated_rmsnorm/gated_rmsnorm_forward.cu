// gated_rmsnorm, forward (see gated_rmsnorm.h for the equation, gated_rmsnorm.cuh for the blocks).
// Grid: groups of channels, the fastest, times runs of rows. Shared memory: sums, and two rows of x
// and z. Bound by memory: x and z once, y once.
// fp64, rows that are no whole number of 16 bytes and groups of more than 4 x 352 vectors:
// norm_forward_any, element by element.
#include "gated_rmsnorm.cuh"

namespace mamba2::gated_rmsnorm {
namespace {

template <class T, int kVectors, GateKind kGate>
__global__ void MAMBA2_LAUNCH_BOUNDS(max_threads(kVectors), min_blocks(kVectors))
    norm_forward(MAMBA2_GRID_CONSTANT const ForwardParams params, int rows_of_each) {
  using C = Columns<T, kVectors>;
  constexpr int kArrays = kGate == GateKind::none ? 1 : 2;
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, rows_of_each);
  const C columns{range.group * in.s, in.s};
  Sums<float>& sums = *static_cast<Sums<float>*>(ptx::dynamic_smem());
  const Ring<T, kVectors, kArrays> ring{reinterpret_cast<char*>(&sums + 1)};
  const float inverse_s = 1.f / static_cast<float>(in.s);
  RowCursor now(in, range.first), next = now;
  const auto load = [&](int64_t row) {
    if (row < range.last) {
      ring.load(row, 0, in.x.ptr, next.at(in.x.b, in.x.l), columns);
      if (kArrays > 1) ring.load(row, 1, in.z.ptr, next.at(in.z.b, in.z.l), columns);
      next.advance(in);
    }
    ptx::cp_async_commit_group();
  };
  sums.clear_missing();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  load(range.first);
  float weight[kVectors][C::kVec];
  columns.load(in.weight, weight);
  MAMBA2_NO_UNROLL
  for (int64_t row = range.first; row < range.last; ++row) {
    load(row + 1);
    ptx::cp_async_wait_group<1>();
    float normed[kVectors][C::kVec], gate[kVectors][C::kVec], sum[1] = {0};
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      ring.read(row, 0, v, normed[v]);
      if (kArrays > 1) ring.read(row, 1, v, gate[v]);
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        gate[v][c] = kArrays > 1 ? fast::silu(gate[v][c]) : 1.f;
        normed[v][c] = gated<kGate>(normed[v][c], gate[v][c]);
        sum[0] += normed[v][c] * normed[v][c];
      }
    }
    sum_over_block(sum, sums, static_cast<int>(row & 1));
    const float r = inverse_rms(sum[0], inverse_s, in);
    T* g_y = static_cast<T*>(params.y.ptr) + now.at(params.y.b, params.y.l) + columns.first;
    now.advance(in);
    MAMBA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (!columns.has(v)) continue;
      MAMBA2_UNROLL
      for (int c = 0; c < C::kVec; ++c) {
        normed[v][c] = output_of<kGate>(normed[v][c], weight[v][c], gate[v][c], r);
      }
      store_vector(g_y + columns.at(v), normed[v]);
    }
  }
}

template <class U, GateKind kGate>
__global__ void MAMBA2_LAUNCH_BOUNDS(kAnyThreads, 1)
    norm_forward_any(MAMBA2_GRID_CONSTANT const ForwardParams params) {
  const Inputs& in = params.in;
  const RowRange range = rows_of_block(in, 1);
  Sums<U>& sums = *static_cast<Sums<U>*>(ptx::dynamic_smem());
  sums.clear_missing();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const RowCursor row(in, range.first);
  const int64_t first = int64_t(range.group) * in.s;
  const auto at = [&](const void* ptr, int64_t b, int64_t l, int i) {
    return load<U>(AnyFloat{ptr, in.dtype}, row.at(b, l) + first + i);
  };
  const auto gate = [&](int i) {
    return kGate == GateKind::none ? U(1) : fast::silu(at(in.z.ptr, in.z.b, in.z.l, i));
  };
  const auto x = [&](int i) { return at(in.x.ptr, in.x.b, in.x.l, i); };
  U sum[1] = {0};
  for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
    const U v = gated<kGate>(x(i), gate(i));
    sum[0] += v * v;
  }
  sum_over_block(sum, sums, 0);
  const U r = inverse_rms(sum[0], U(1) / U(in.s), in);
  for (int i = threadIdx.x; i < in.s; i += kAnyThreads) {
    const U g = gate(i), weight = load<U>(in.weight, first + i);
    const U y = output_of<kGate>(gated<kGate>(x(i), g), weight, g, r);
    store(params.y.ptr, in.dtype, row.at(params.y.b, params.y.l) + first + i, y);
  }
}

}  // namespace

int forward(const ForwardParams& params, void* stream) {
  const Inputs& in = params.in;
  const BlockShape shape = block_shape(in);
  const int64_t groups = in.d / in.s;
  const int rows = rows_per_block(in);
  return with_gate(in.z.ptr != nullptr, in.norm_before_gate, [&](auto gate) {
    LaunchShape at;
    at.programmatic = true;
    if (shape.threads == 0) {
      at.grid = dim3(static_cast<unsigned>(in.b * in.l * groups));
      at.threads = kAnyThreads;
      return with_accumulator(in.dtype, [&](auto tag) {
        using U = typename decltype(tag)::type;
        at.smem_bytes = sizeof(Sums<U>);
        return launch(norm_forward_any<U, gate()>, at, stream, params);
      });
    }
    at.grid = dim3(static_cast<unsigned>(parts_of(in) * groups));
    at.threads = shape.threads;
    return with_vectors(in.dtype, shape.vectors, [&](auto tag, auto vectors) {
      using T = typename decltype(tag)::type;
      constexpr int kArrays = gate() == GateKind::none ? 1 : 2;
      at.smem_bytes = sizeof(Sums<float>) + Ring<T, vectors(), kArrays>::bytes(shape.threads);
      return launch(norm_forward<T, vectors(), gate()>, at, stream, params, rows);
    });
  });
}

}  // namespace mamba2::gated_rmsnorm
