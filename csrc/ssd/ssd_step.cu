// ssd_step: one decoding step of T tokens (see ssd_step.h), the state read and written once.
//
// A row of the state (n elements of one p) lies in the registers of 8 neighbouring threads: what a
// token costs once a thread (softplus, exponential, addresses) and once a row (the sum over
// threads, which is y) is spread over up to 64 elements. All of a thread's rows are on their way
// before the first is used, and stay in registers through all tokens.
// Grid: (head of a batch entry, kRows * kThreads / kLanes rows). No shared memory.
// Bound by memory: the state once in and once out; at batch 1 by the latency of one such trip.
// Rows that are no whole number of 16 bytes, fp64 and rarer pairs of types: ssd_step_any, a warp a
// row, element by element.
// Deterministic; nothing depends on the batch.
#include "ssd_step.h"

#include "../core/activations.cuh"
#include "../core/dispatch.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "formulas.cuh"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocksPerSm = 8;  // 128 registers a thread: no spill; 64 KB of loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kLanes, class U>
MAMBA2_DEVICE U sum_over_lanes(U v) {
  MAMBA2_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// What a token of a head does to every row: H = decay H + delta x B^T.
template <class U>
struct TokenWeights {
  U delta, decay;
};
// What they are made of, as it lies in memory: of every 8 lanes the first has dt, the second the
// bias, the third A, so that all three are on their way at once.
struct TokenScalars {
  AnyBits mine;

  MAMBA2_DEVICE void load(const Inputs& in, int64_t i_b, int i_t, int i_h) {
    const int which = threadIdx.x % 8;
    const int64_t dt_at = i_b * in.dt.b + i_t * in.dt.l + i_h * in.dt.h;
    const AnyFloat dt{in.dt.ptr, in.dt_dtype};
    const AnyFloat from = which == 0 ? dt : which == 1 ? in.dt_bias : in.A;
    if (which < 3 && from) mine = load_bits(from, which == 0 ? dt_at : i_h);
  }
  template <class U>
  MAMBA2_DEVICE TokenWeights<U> weights(const Inputs& in) const {
    const U v = value_of<U>(mine), dt = __shfl_sync(kAllLanes, v, 0, 8);
    const U bias = __shfl_sync(kAllLanes, v, 1, 8), A = __shfl_sync(kAllLanes, v, 2, 8);
    const U delta = delta_of(dt, bias, in.dt_softplus, U(in.dt_min), U(in.dt_max)).value;
    return {delta, exp(delta * A)};
  }
};
MAMBA2_DEVICE AnyBits load_skip_weight(const Inputs& in, int i_h, int i_p) {
  return load_bits(in.D, in.D_per_channel ? int64_t(i_h) * in.shape.p + i_p : i_h);
}
MAMBA2_DEVICE int64_t at_token(const Strided& t, int64_t i_b, int i_t, int i_h) {
  return i_b * t.b + i_t * t.l + int64_t(i_h) * t.h;
}

// ---- rows in vectors ----

template <class S_, class T_, int kVectors_>
struct Layout {
  using S = S_;                               // state
  using T = T_;                               // x, B, C, z, y
  static constexpr int kLanes = 8;            // 128 bytes of a row at a time
  static constexpr int kVectors = kVectors_;  // of a lane and row
  static constexpr int kColumns = kVectorBytes / static_cast<int>(sizeof(S));  // of a vector
  // Of a thread. B and C of a long row take registers too, most of them in fp32.
  static constexpr int kRows = kVectors * kColumns <= 16 ? 4 : sizeof(T) == 2 ? 2 : 1;
  static constexpr int kGroups = kThreads / kLanes;  // of threads
};

// The rows of one thread: row r of them is row i_p(r) of the head.
template <class L>
struct Rows {
  static constexpr int kColumns = L::kColumns;
  float H[L::kRows][L::kVectors][kColumns];
  int lane, first;

  MAMBA2_DEVICE Rows()
      : lane(threadIdx.x % L::kLanes),
        first(blockIdx.y * (L::kRows * L::kGroups) + threadIdx.x / L::kLanes) {}
  MAMBA2_DEVICE int i_p(int r) const { return first + r * L::kGroups; }
  MAMBA2_DEVICE int column(int v) const { return (v * L::kLanes + lane) * kColumns; }
  // The row whose y this thread writes; L::kRows or more: none.
  MAMBA2_DEVICE bool has_own(int p) const { return lane < L::kRows && i_p(lane) < p; }
  MAMBA2_DEVICE int own() const { return i_p(lane); }

  using PackedRows = Packed<typename L::S, kColumns>[L::kRows][L::kVectors];
  MAMBA2_DEVICE void load(const typename L::S* g_state, int p, int n, PackedRows& packed) const {
    const typename L::S* g_row = g_state + first * n + column(0);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r, g_row += L::kGroups * n) {
      const bool has_row = i_p(r) < p;
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) {
        packed[r][v].zero();
        if (has_row & (column(v) < n)) packed[r][v].load(g_row + v * L::kLanes * kColumns);
      }
    }
  }
  MAMBA2_DEVICE void unpack(const PackedRows& packed) {
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) packed[r][v].unpack(H[r][v]);
    }
  }
  MAMBA2_DEVICE void store(typename L::S* g_state, int p, int n) const {
    typename L::S* g_row = g_state + first * n + column(0);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r, g_row += L::kGroups * n) {
      const bool has_row = i_p(r) < p;
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) {
        if (has_row & (column(v) < n)) store_vector(g_row + v * L::kLanes * kColumns, H[r][v]);
      }
    }
  }
};

// What a thread needs of one token, as it lies in memory.
template <class L>
struct Token {
  using T = typename L::T;
  Packed<T, L::kColumns> B[L::kVectors], C[L::kVectors];
  T x[L::kRows], z;  // z of the row whose y the thread writes
  TokenScalars scalars;

  MAMBA2_DEVICE void load(const Rows<L>& rows, const Inputs& in, int64_t i_b, int i_t, int i_h) {
    const int i_g = i_h / in.shape.heads_per_group(), p = in.shape.p;
    const T* g_B = static_cast<const T*>(in.B.ptr) + at_token(in.B, i_b, i_t, i_g);
    const T* g_C = static_cast<const T*>(in.C.ptr) + at_token(in.C, i_b, i_t, i_g);
    MAMBA2_UNROLL
    for (int v = 0; v < L::kVectors; ++v) {
      B[v].zero();
      C[v].zero();
      if (rows.column(v) < in.shape.n) {
        B[v].load(g_B + rows.column(v));
        C[v].load(g_C + rows.column(v));
      }
    }
    const T* g_x = static_cast<const T*>(in.x.ptr) + at_token(in.x, i_b, i_t, i_h);
    const T* g_z = static_cast<const T*>(in.z.ptr) + at_token(in.z, i_b, i_t, i_h);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      x[r] = rows.i_p(r) < p ? g_x[rows.i_p(r)] : convert<T>(0.f);
    }
    z = in.z && rows.has_own(p) ? g_z[rows.own()] : convert<T>(0.f);
    scalars.load(in, i_b, i_t, i_h);
  }
};

// The state becomes the token's; y of the thread's own row, D the skip weight there.
template <class L>
MAMBA2_DEVICE float step_token(Rows<L>& rows, const Token<L>& token, float D, const Inputs& in) {
  const auto weights = token.scalars.template weights<float>(in);
  float B[L::kVectors][L::kColumns], C[L::kVectors][L::kColumns];
  MAMBA2_UNROLL
  for (int v = 0; v < L::kVectors; ++v) {
    token.B[v].unpack(B[v]);
    token.C[v].unpack(C[v]);
  }
  float own_y = 0, own_x = 0;
  MAMBA2_UNROLL
  for (int r = 0; r < L::kRows; ++r) {
    const float x = convert<float>(token.x[r]), delta_x = weights.delta * x;
    float y = 0;
    MAMBA2_UNROLL
    for (int v = 0; v < L::kVectors; ++v) {
      MAMBA2_UNROLL
      for (int k = 0; k < L::kColumns; ++k) {
        rows.H[r][v][k] = weights.decay * rows.H[r][v][k] + delta_x * B[v][k];
        y += rows.H[r][v][k] * C[v][k];
      }
    }
    y = sum_over_lanes<L::kLanes>(y);
    own_y = rows.lane == r ? y : own_y;
    own_x = rows.lane == r ? x : own_x;
  }
  const float y = own_y + D * own_x;
  return in.z ? y * fast::silu(convert<float>(token.z)) : y;
}

template <class L>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    ssd_step_vectors(MAMBA2_GRID_CONSTANT const StepParams params) {
  using S = typename L::S;
  using T = typename L::T;
  const Shape& shape = params.in.shape;
  const int i_h = blockIdx.x % shape.h;
  const int64_t i_b = blockIdx.x / shape.h;
  if (!params.early_state) ptx::griddepcontrol_wait();
  const StepSlots slots = slots_of(params, i_b);
  const int64_t head = int64_t(i_h) * shape.p * shape.n;
  S* g_state = static_cast<S*>(params.state) + head;

  Rows<L> rows;
  const bool has_own = rows.has_own(shape.p);
  const int64_t token_y = int64_t(shape.h) * shape.p;
  T* g_y = static_cast<T*>(params.y) + i_b * shape.l * token_y + i_h * shape.p + rows.own();
  if (slots.source < 0) {  // padding: y = 0
    ptx::griddepcontrol_wait();
    for (int i_t = 0; i_t < shape.l; ++i_t) {
      if (has_own) g_y[i_t * token_y] = convert<T>(0.f);
    }
    return;
  }
  // The state and the first token are on their way together; the state perhaps while the kernel
  // that makes the token still runs.
  typename Rows<L>::PackedRows packed;
  rows.load(g_state + slots.source * params.slot_stride, shape.p, shape.n, packed);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  Token<L> token;
  if (shape.l > 0) token.load(rows, params.in, i_b, 0, i_h);
  AnyBits skip;  // D; 0 without
  if (params.in.D && has_own) skip = load_skip_weight(params.in, i_h, rows.own());
  rows.unpack(packed);
  const float D = value_of<float>(skip);
  MAMBA2_NO_UNROLL
  for (int i_t = 0; i_t < shape.l; ++i_t) {
    const float y = step_token(rows, token, D, params.in);
    if (has_own) g_y[i_t * token_y] = convert<T>(y);
    if (i_t + 1 < shape.l) token.load(rows, params.in, i_b, i_t + 1, i_h);
  }
  if (slots.target >= 0) {
    rows.store(g_state + slots.target * params.slot_stride, shape.p, shape.n);
  }
}

template <class L>
int run_vectors(const StepParams& params, void* stream) {
  const Shape& shape = params.in.shape;
  LaunchShape at;
  at.grid =
      dim3(static_cast<unsigned>(shape.b * shape.h), ceil_div(shape.p, L::kRows * L::kGroups));
  at.threads = kThreads;
  at.programmatic = true;
  return launch(ssd_step_vectors<L>, at, stream, params);
}

template <class S, class T>
int run_vectors(const StepParams& params, void* stream) {
  constexpr int kLaneBytes = Layout<S, T, 1>::kLanes * kVectorBytes;
  const int vectors = ceil_div(params.in.shape.n * static_cast<int>(sizeof(S)), kLaneBytes);
  if (vectors <= 1) return run_vectors<Layout<S, T, 1>>(params, stream);
  if (vectors <= 2) return run_vectors<Layout<S, T, 2>>(params, stream);
  if constexpr (sizeof(S) == 4) {  // n <= 256: rows of 16-bit states have 4 vectors a lane at most
    if (vectors > 4) return run_vectors<Layout<S, T, 8>>(params, stream);
  }
  return run_vectors<Layout<S, T, 4>>(params, stream);
}

// ---- any sizes, any types ----

constexpr int kAnyColumns = 8;  // a thread's: n <= 256

template <class U>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, 1)
    ssd_step_any(MAMBA2_GRID_CONSTANT const StepParams params) {
  const Inputs& in = params.in;
  const Shape& shape = in.shape;
  const int lane = threadIdx.x % 32, i_h = blockIdx.x % shape.h;
  const int i_g = i_h / shape.heads_per_group();
  const int i_p = blockIdx.y * (kThreads / 32) + threadIdx.x / 32;
  const int64_t i_b = blockIdx.x / shape.h;
  if (i_p >= shape.p) return;
  const StepSlots slots = slots_of(params, i_b);
  const int64_t row = (int64_t(i_h) * shape.p + i_p) * shape.n;
  const auto input = [&](const Strided& t, int64_t at) {
    return load<U>(AnyFloat{t.ptr, in.dtype}, at);
  };

  U H[kAnyColumns];
  for (int k = 0; k < kAnyColumns; ++k) {
    const int i_n = k * 32 + lane;
    const int64_t at = slots.source * params.slot_stride + row + i_n;
    const bool there = slots.source >= 0 && i_n < shape.n;
    H[k] = there ? load<U>(AnyFloat{params.state, params.state_dtype}, at) : U(0);
  }
  for (int i_t = 0; i_t < shape.l; ++i_t) {
    TokenScalars scalars;
    scalars.load(in, i_b, i_t, i_h);
    const TokenWeights<U> weights = scalars.weights<U>(in);
    const U x = input(in.x, at_token(in.x, i_b, i_t, i_h) + i_p);
    U y = 0;
    for (int k = 0; k < kAnyColumns; ++k) {
      const int i_n = k * 32 + lane;
      if (i_n >= shape.n) break;
      const U B = input(in.B, at_token(in.B, i_b, i_t, i_g) + i_n);
      H[k] = weights.decay * H[k] + weights.delta * x * B;
      y += H[k] * input(in.C, at_token(in.C, i_b, i_t, i_g) + i_n);
    }
    y = sum_over_lanes<32>(y);
    if (in.D) y += value_of<U>(load_skip_weight(in, i_h, i_p)) * x;
    if (in.z) y *= silu(input(in.z, at_token(in.z, i_b, i_t, i_h) + i_p));
    const int64_t at = ((i_b * shape.l + i_t) * shape.h + i_h) * shape.p + i_p;
    if (lane == 0) store(params.y, in.dtype, at, slots.source >= 0 ? y : U(0));
  }
  if (slots.source < 0 || slots.target < 0) return;
  for (int k = 0; k < kAnyColumns; ++k) {
    const int i_n = k * 32 + lane;
    const int64_t at = slots.target * params.slot_stride + row + i_n;
    if (i_n < shape.n) store(params.state, params.state_dtype, at, H[k]);
  }
}

int run_any(const StepParams& params, void* stream) {
  const Shape& shape = params.in.shape;
  return with_accumulator(params.in.dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    LaunchShape at;
    at.grid = dim3(static_cast<unsigned>(shape.b * shape.h), ceil_div(shape.p, kThreads / 32));
    at.threads = kThreads;
    return launch(ssd_step_any<U>, at, stream, params);
  });
}

// Every row and every slot begins at a multiple of 16 bytes, B's and C's rows too.
bool in_vectors(const StepParams& params) {
  const auto whole = [](int64_t elements, DType dtype) {
    return elements * int64_t(size_of(dtype)) % kVectorBytes == 0;
  };
  return whole(params.in.shape.n, params.state_dtype) &&
         whole(params.in.shape.n, params.in.dtype) &&
         whole(params.slot_stride, params.state_dtype) &&
         reinterpret_cast<uintptr_t>(params.state) % kVectorBytes == 0;
}

}  // namespace

int ssd_step(const StepParams& params, void* stream) {
  const Range range("ssd_step");
  const DType x = params.in.dtype, state = params.state_dtype;
  if (!in_vectors(params)) return run_any(params, stream);
  if (x == DType::f32 && state == DType::f32) return run_vectors<float, float>(params, stream);
  if (x == DType::bf16 && state == DType::f32) return run_vectors<float, bf16>(params, stream);
  if (x == DType::bf16 && state == DType::bf16) return run_vectors<bf16, bf16>(params, stream);
  if (x == DType::bf16 && state == DType::f16) return run_vectors<f16, bf16>(params, stream);
  if (x == DType::f16 && state == DType::f32) return run_vectors<float, f16>(params, stream);
  if (x == DType::f16 && state == DType::f16) return run_vectors<f16, f16>(params, stream);
  return run_any(params, stream);
}

}  // namespace mamba2::ssd
