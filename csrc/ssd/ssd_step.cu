// ssd_step: one decoding step of T tokens (see ssd_step.h), the state read and written once.
//
// A row of the state (n elements of one p) lies in the registers of 8 neighbouring threads: what a
// token costs once a thread (softplus, exponential, addresses) and once a row (the sum over
// threads, which is y) is spread over up to 64 elements. They stay in registers through all tokens.
// A task is kRows * kThreads / kLanes rows of one head; a block takes every gridDim.x-th of them,
// and has what the next one needs on its way while it steps one: the state, B and C to shared
// memory (cp.async), the rest to registers. A thread reads the state that it copied itself, a warp
// its own copy of B and C: there is no barrier of the block. Grid: as many blocks as the card holds
// at once, or tasks, where these are few or very many. Shared memory: what two tasks need. Bound by
// memory: the state once in and once out; at batch 1 by the latency of one such trip. Rows that are
// no whole number of 16 bytes, fp64 and rarer pairs of types: ssd_step_any. Deterministic; nothing
// depends on the batch.
#include "../core/activations.cuh"
#include "../core/launch.h"
#include "../core/vectors.cuh"
#include "../ptx/sm80.cuh"
#include "ssd_step.cuh"

namespace mamba2::ssd {
namespace {

constexpr int kThreads = 64;
// Registers leave no more: 128 a thread, and addresses take some where nothing is whole.
constexpr int most_blocks_per_sm(bool whole) { return whole ? 8 : 6; }
constexpr int kSms = 132;             // of an H100 or H200, whatever the card
constexpr int kSmemOfSm = 216 << 10;  // leaves what the driver takes of 8 blocks
// From so many tasks a block on, each is a block of its own: SMs are not equally fast, and the card
// deals out blocks as they end. With fewer, the next task's copies under this one gain more.
constexpr int kManyTasks = 8;

// ---- rows in vectors ----

// kWhole: p is a whole number of tasks, n of lanes; then addresses are constants away from each
// other, and nothing is asked.
template <class S_, class T_, int kVectors_, bool kWhole_>
struct Layout {
  using S = S_;                               // state
  using T = T_;                               // x, B, C, z, y
  static constexpr int kLanes = 8;            // 128 bytes of a row at a time
  static constexpr int kVectors = kVectors_;  // of a lane and row
  static constexpr bool kWhole = kWhole_;
  static constexpr int kColumns = kVectorBytes / static_cast<int>(sizeof(S));  // of a vector
  // Of a thread. B and C of a long row take registers too, most of them in fp32.
  static constexpr int kRows = kVectors * kColumns <= 16 ? 4 : sizeof(T) == 2 ? 2 : 1;
  static constexpr int kGroups = kThreads / kLanes;  // of threads
  static constexpr int kTaskRows = kRows * kGroups;
  static constexpr int kRowColumns = kVectors * kLanes * kColumns;

  static MAMBA2_HD int n(const Shape& shape) { return kWhole ? kRowColumns : shape.n; }
};

// Which rows: the i_part-th part of head i_h of batch entry i_b.
struct Place {
  int i_b, i_h, i_part;
};
// A task: its place, and where the state of its batch entry lies.
struct Task : Place {
  bool there;  // whether there is such a task
  StepSlots slots;
};

// A block's tasks, one after another, found without a division.
class Tasks {
 public:
  MAMBA2_DEVICE Tasks(const StepParams& params, int parts)
      : params_(params),
        parts_(parts),
        stride_(place(static_cast<int>(gridDim.x))),
        at_(place(static_cast<int>(blockIdx.x))) {}
  // The task here; then moves on.
  MAMBA2_DEVICE Task take() {
    Task task{at_, at_.i_b < params_.in.shape.b, {-1, -1}};
    if (task.there) task.slots = slots_of(params_, at_.i_b);
    at_.i_part += stride_.i_part;
    at_.i_h += stride_.i_h;
    at_.i_b += stride_.i_b;
    if (at_.i_part >= parts_) at_.i_part -= parts_, ++at_.i_h;
    if (at_.i_h >= params_.in.shape.h) at_.i_h -= params_.in.shape.h, ++at_.i_b;
    return task;
  }

 private:
  MAMBA2_DEVICE Place place(int number) const {
    const int head = number / parts_, h = params_.in.shape.h;
    return {head / h, head % h, number % parts_};
  }
  const StepParams& params_;
  int parts_;
  Place stride_, at_;
};

// Of this task and the next: a thread's vectors of the state, a warp's B and C.
template <class L>
struct Ring {
  using T = typename L::T;
  static constexpr int kStages = 2;
  static constexpr int kStateBytes = L::kRows * L::kVectors * kThreads * kVectorBytes;
  static constexpr int kRowBytes = L::kRowColumns * static_cast<int>(sizeof(T));  // of B, or of C
  static constexpr int kStageBytes = kStateBytes + kThreads / 32 * 2 * kRowBytes;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kFit = kSmemOfSm / kBytes, kMost = most_blocks_per_sm(L::kWhole);
  static constexpr int kBlocksPerSm = kFit < kMost ? kFit : kMost;
  char* s_bytes;

  MAMBA2_DEVICE char* state(int stage, int r, int v) const {
    const int which = (r * L::kVectors + v) * kThreads + static_cast<int>(threadIdx.x);
    return s_bytes + stage * kStageBytes + which * kVectorBytes;
  }
  // B (which = 0) or C (1), kRowColumns of it, zeros behind n.
  MAMBA2_DEVICE char* row(int stage, int which) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return s_bytes + stage * kStageBytes + kStateBytes + (warp * 2 + which) * kRowBytes;
  }
};

// The rows of one thread: row r of them is row i_p(r) of the head.
template <class L>
struct Rows {
  static constexpr int kColumns = L::kColumns;
  using S = typename L::S;
  float H[L::kRows][L::kVectors][kColumns];
  int lane, first, p, n;

  MAMBA2_DEVICE Rows(const Place& place, const Shape& shape)
      : lane(threadIdx.x % L::kLanes),
        first(place.i_part * L::kTaskRows + threadIdx.x / L::kLanes),
        p(shape.p),
        n(L::n(shape)) {}
  MAMBA2_DEVICE int i_p(int r) const { return first + r * L::kGroups; }
  MAMBA2_DEVICE int column(int v) const { return (v * L::kLanes + lane) * kColumns; }
  MAMBA2_DEVICE bool has_row(int r) const { return L::kWhole || i_p(r) < p; }
  MAMBA2_DEVICE bool has_column(int v) const { return L::kWhole || column(v) < n; }
  // The row whose y this thread writes, if it writes one.
  MAMBA2_DEVICE bool has_own() const { return lane < L::kRows && has_row(lane); }
  MAMBA2_DEVICE int own() const { return i_p(lane); }
  // The thread's first element of the head's state.
  MAMBA2_DEVICE int64_t first_element(const StepParams& params, int64_t slot, int i_h) const {
    return slot * params.slot_stride + (int64_t(i_h) * p + first) * n + column(0);
  }
  // Row r, vector v, counted from there.
  MAMBA2_DEVICE int element(int r, int v) const {
    return r * L::kGroups * n + v * L::kLanes * kColumns;
  }

  // Begins to copy the task's state; zeros where there is none.
  MAMBA2_DEVICE void request(const StepParams& params, const Task& task, const Ring<L>& ring,
                             int stage) const {
    const bool there = task.slots.source >= 0;
    const S* g_state = static_cast<const S*>(params.state);
    if (there) g_state += first_element(params, task.slots.source, task.i_h);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) {
        ptx::cp_async_16(ring.state(stage, r, v), g_state + element(r, v),
                         there & has_row(r) & has_column(v));
      }
    }
  }
  MAMBA2_DEVICE void take(const Ring<L>& ring, int stage) {
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) {
        load_vector(reinterpret_cast<const S*>(ring.state(stage, r, v)), H[r][v]);
      }
    }
  }
  MAMBA2_DEVICE void store(const StepParams& params, const Task& task) const {
    S* g_state = static_cast<S*>(params.state);
    g_state += first_element(params, task.slots.target, task.i_h);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      MAMBA2_UNROLL
      for (int v = 0; v < L::kVectors; ++v) {
        if (has_row(r) & has_column(v)) store_vector(g_state + element(r, v), H[r][v]);
      }
    }
  }
};

// Begins to copy a token's B and C for the warp; zeros where there is none.
template <class L>
MAMBA2_DEVICE void request_token(const Inputs& in, const Task& task, int i_t, const Ring<L>& ring,
                                 int stage) {
  using T = typename L::T;
  constexpr int kPieces = Ring<L>::kRowBytes / kVectorBytes;
  const bool there = task.slots.source >= 0 && i_t < in.shape.l;
  const int i_g = in.shape.g == 1 ? 0 : task.i_h / in.shape.heads_per_group();
  MAMBA2_UNROLL
  for (int first = 0; first < 2 * kPieces; first += 32) {
    const int i = first + static_cast<int>(threadIdx.x) % 32, which = i / kPieces;
    if (2 * kPieces % 32 != 0 && which > 1) continue;
    const Strided& from = which == 0 ? in.B : in.C;
    const int column = i % kPieces * (kVectorBytes / static_cast<int>(sizeof(T)));
    const T* g_row = static_cast<const T*>(from.ptr);
    if (there) g_row += at_token(from, task.i_b, i_t, i_g);
    ptx::cp_async_16(ring.row(stage, which) + i % kPieces * kVectorBytes, g_row + column,
                     there && (L::kWhole || column < in.shape.n));
  }
}

// What a thread needs of a token beside them, as it lies in memory.
template <class L>
struct Token {
  using T = typename L::T;
  T x[L::kRows], z;  // z of the row whose y the thread writes
  TokenScalars scalars;
  AnyBits skip;  // D there; 0 without

  MAMBA2_DEVICE void load(const Inputs& in, const Task& task, int i_t) {
    const Rows<L> rows(task, in.shape);
    if (task.slots.source < 0 || i_t >= in.shape.l) return;
    const T* g_x = static_cast<const T*>(in.x.ptr) + at_token(in.x, task.i_b, i_t, task.i_h);
    const T* g_z = static_cast<const T*>(in.z.ptr) + at_token(in.z, task.i_b, i_t, task.i_h);
    MAMBA2_UNROLL
    for (int r = 0; r < L::kRows; ++r) {
      x[r] = rows.has_row(r) ? g_x[rows.i_p(r)] : convert<T>(0.f);
    }
    z = in.z && rows.has_own() ? g_z[rows.own()] : convert<T>(0.f);
    scalars.load(in, task.i_b, i_t, task.i_h);
    if (in.D && rows.has_own()) skip = load_skip_weight(in, task.i_h, rows.own());
  }
};

// The state becomes the token's; y of the thread's own row.
template <class L>
MAMBA2_DEVICE float step_token(Rows<L>& rows, const Token<L>& token, const Ring<L>& ring, int stage,
                               const Inputs& in) {
  using T = typename L::T;
  const auto weights = token.scalars.template weights<float>(in);
  float B[L::kVectors][L::kColumns], C[L::kVectors][L::kColumns];
  MAMBA2_UNROLL
  for (int v = 0; v < L::kVectors; ++v) {
    load_vector(reinterpret_cast<const T*>(ring.row(stage, 0)) + rows.column(v), B[v]);
    load_vector(reinterpret_cast<const T*>(ring.row(stage, 1)) + rows.column(v), C[v]);
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
  const float y = own_y + value_of<float>(token.skip) * own_x;
  return in.z ? y * fast::silu(convert<float>(token.z)) : y;
}

// One task: its state, and its first token, are there or on their way, and one group of copies
// behind them.
template <class L>
MAMBA2_DEVICE void step_task(const StepParams& params, const Task& task, Token<L> token,
                             const Ring<L>& ring, int stage) {
  using T = typename L::T;
  const Inputs& in = params.in;
  const int tokens = static_cast<int>(in.shape.l);
  Rows<L> rows(task, in.shape);
  const bool has_own = rows.has_own();
  const int64_t token_y = int64_t(in.shape.h) * in.shape.p;
  T* g_y = static_cast<T*>(params.y) + task.i_b * tokens * token_y;
  g_y += task.i_h * in.shape.p + rows.own();
  ptx::cp_async_wait_group<1>();
  __syncwarp();
  if (task.slots.source < 0) {  // padding: y = 0
    MAMBA2_NO_UNROLL
    for (int i_t = 0; i_t < tokens; ++i_t) {
      if (has_own) g_y[i_t * token_y] = convert<T>(0.f);
    }
    return;
  }
  rows.take(ring, stage);
  MAMBA2_NO_UNROLL
  for (int i_t = 0; i_t < tokens; ++i_t) {
    const float y = step_token(rows, token, ring, stage, in);
    if (has_own) g_y[i_t * token_y] = convert<T>(y);
    if (i_t + 1 == tokens) break;
    __syncwarp();
    request_token(in, task, i_t + 1, ring, stage);
    ptx::cp_async_commit_group();
    token.load(in, task, i_t + 1);
    ptx::cp_async_wait_group<0>();
    __syncwarp();
  }
  if (task.slots.target >= 0) rows.store(params, task);
}

template <class L>
__global__ void MAMBA2_LAUNCH_BOUNDS(kThreads, Ring<L>::kBlocksPerSm)
    ssd_step_vectors(MAMBA2_GRID_CONSTANT const StepParams params, int parts) {
  const Ring<L> ring{static_cast<char*>(ptx::dynamic_smem())};
  const Inputs& in = params.in;
  const auto request_state = [&](const Task& task, int stage) {
    Rows<L>(task, in.shape).request(params, task, ring, stage);
  };
  Tasks tasks(params, parts);
  if (!params.early_state) ptx::griddepcontrol_wait();
  Task task = tasks.take();
  request_state(task, 0);  // perhaps while the kernel that makes the token still runs
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  request_token(in, task, 0, ring, 0);
  ptx::cp_async_commit_group();
  Token<L> token;
  token.load(in, task, 0);
  MAMBA2_NO_UNROLL
  for (int stage = 0; task.there; stage ^= 1) {
    const Task next = tasks.take();
    __syncwarp();  // the warp has read what lay here
    request_state(next, stage ^ 1);
    request_token(in, next, 0, ring, stage ^ 1);
    ptx::cp_async_commit_group();
    Token<L> next_token;
    next_token.load(in, next, 0);
    step_task(params, task, token, ring, stage);
    task = next;
    token = next_token;
  }
}

template <class L>
int run_layout(const StepParams& params, void* stream) {
  constexpr int kAtOnce = kSms * Ring<L>::kBlocksPerSm;
  const Shape& shape = params.in.shape;
  const int parts = ceil_div(shape.p, L::kTaskRows);
  const int64_t tasks = shape.b * shape.h * parts;
  const bool one_each = tasks <= kAtOnce || tasks >= int64_t{kManyTasks} * kAtOnce;
  LaunchShape at;
  at.grid = dim3(static_cast<unsigned>(one_each ? tasks : kAtOnce));
  at.threads = kThreads;
  at.smem_bytes = Ring<L>::kBytes;
  at.programmatic = true;
  return launch(ssd_step_vectors<L>, at, stream, params, parts);
}
template <class S, class T, int kVectors>
int run_vectors(const StepParams& params, void* stream) {
  using Whole = Layout<S, T, kVectors, true>;
  const Shape& shape = params.in.shape;
  const bool whole = shape.p % Whole::kTaskRows == 0 && shape.n == Whole::kRowColumns;
  return whole ? run_layout<Whole>(params, stream)
               : run_layout<Layout<S, T, kVectors, false>>(params, stream);
}

template <class S, class T>
int run_vectors(const StepParams& params, void* stream) {
  constexpr int kLaneBytes = Layout<S, T, 1, false>::kLanes * kVectorBytes;
  const int vectors = ceil_div(params.in.shape.n * static_cast<int>(sizeof(S)), kLaneBytes);
  if (vectors <= 1) return run_vectors<S, T, 1>(params, stream);
  if (vectors <= 2) return run_vectors<S, T, 2>(params, stream);
  if constexpr (sizeof(S) == 4) {  // n <= 256: rows of 16-bit states have 4 vectors a lane at most
    if (vectors > 4) return run_vectors<S, T, 8>(params, stream);
  }
  return run_vectors<S, T, 4>(params, stream);
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
  if (!in_vectors(params)) return ssd_step_any(params, stream);
  if (x == DType::f32 && state == DType::f32) return run_vectors<float, float>(params, stream);
  if (x == DType::bf16 && state == DType::f32) return run_vectors<float, bf16>(params, stream);
  if (x == DType::bf16 && state == DType::bf16) return run_vectors<bf16, bf16>(params, stream);
  if (x == DType::bf16 && state == DType::f16) return run_vectors<f16, bf16>(params, stream);
  if (x == DType::f16 && state == DType::f32) return run_vectors<float, f16>(params, stream);
  if (x == DType::f16 && state == DType::f16) return run_vectors<f16, f16>(params, stream);
  return ssd_step_any(params, stream);
}

}  // namespace mamba2::ssd
