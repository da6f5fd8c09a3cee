// The feeders of fused_scan (sm_90a), warps of one warpgroup: the loader, the decays of each unit's
// tokens, and the storer of y.
#pragma once
#include "fused_scan_sm90.cuh"

namespace mamba2::ssd::sm90 {

// One warp, all of whose values are uniform; one lane acts. What a chunk costs it is what a stage
// arrives later, and in a sum what the chunk takes.
template <class I>
struct Loader {
  using T = typename I::T;
  static constexpr int kN = I::kN, kUnits = I::kUnits, kStages = stages_of<I>();
  static constexpr bool kGate = I::kGate;
  using Smem = SmemOf<I>;
  const FusedScanArgs& args;
  Smem& s;
  tile::RingPosition<kStages> at;
  tile::RingPosition<kTaskSlots> published;
  int announced = -1;  // the last ticket; < 0: the next one is still to come

  // All of a stage's bytes are expected and asked for; `full` still wants the loader's arrival.
  MAMBA2_DEVICE void load(const Unit (&units)[kUnits], int row, int token, bool backwards) {
    auto& stage = s.stage[at.stage];
    ptx::Mbarrier* full = &s.ring.full[at.stage];
    const int active = units[kUnits - 1].active ? kUnits : 1, group = units[0].group;
    const uint32_t tile_bytes = kQ * kP * sizeof(T);
    ptx::mbarrier_expect_tx(
        full, backwards ? kQ * kN * sizeof(T) + active * tile_bytes
                        : 2 * kQ * kN * sizeof(T) + active * tile_bytes * (1 + kGate));
    if (!backwards) ptx::tma_load_5d(stage.C, &args.C, 0, token, 0, group, row, full);
    ptx::tma_load_5d(stage.B, &args.B, 0, token, 0, group, row, full);
    MAMBA2_UNROLL
    for (int half = 0; half < kUnits; ++half) {
      const Unit u = units[half];
      if (!u.active) break;
      ptx::tma_load_4d(stage.x[half], &args.x, u.p_block * kP, u.head, token, row, full);
      if (kGate && !backwards)
        ptx::tma_load_4d(stage.z[half], &args.z, u.p_block * kP, u.head, token, row, full);
    }
  }
  static MAMBA2_DEVICE int flags_of(const Walk<I>& walk, const Chunk& next) {
    return (walk.i == walk.first() ? kBeginsTask : 0) | (next.i_seq < 0 ? kEndsTask : 0) |
           (walk.task.backwards ? kBackwards : 0) | (walk.chunk.i_c == 0 ? kBeginsSequence : 0) |
           (walk.chunk.is_last ? kEndsSequence : 0);
  }
  MAMBA2_DEVICE int kept_at(const Chunk& c) const {
    static_assert(kKeptQ == 2 * kQ, "every second state is kept");
    return args.kept_states ? 2 * I::chunking(args, true).first(c.i_seq) + c.i_c : 1;
  }
  static MAMBA2_DEVICE Unit uniform(const Unit& u) {
    return {tile::uniform(u.index), tile::uniform(u.head), tile::uniform(u.p_block),
            tile::uniform(u.group), tile::uniform(u.active) != 0};
  }
  // walk's chunk into the next stage, which its readers have left.
  MAMBA2_DEVICE void fill(const Walk<I>& walk, const Unit (&units)[kUnits], const Chunk& next) {
    const Chunk& c = walk.chunk;
    const Task& task = walk.task;
    const int row = tile::uniform(c.row), token = tile::uniform(c.token);
    s.ring.wait_empty(at);
    __syncwarp();  // no lane looks at a barrier that has gone on since
    if (ptx::elect_sync()) {
      load(units, row, token, task.backwards);
      s.info[at.stage] = {
          flags_of(walk, next), c.row,     c.token, c.count, c.i_seq, task.pair, task.slot,
          task.segment,         kept_at(c)};
      s.ring.fill(at);
    }
    at.advance();
  }
  MAMBA2_DEVICE int take_after(int ticket) const {
    const bool takes = threadIdx.x % 32 == 0;  // the lane whose values are uniform()
    if (args.ticket) return tile::uniform(takes ? ptx::atom_add_relaxed_gpu(args.ticket, 1) : 0);
    return ticket < 0 ? first_ticket(args) : ticket_after(args, ticket);
  }
  // The next task that has chunks, or that there is none.
  MAMBA2_DEVICE void announce_after(int ticket) {
    do announced = take_after(ticket), ticket = announced;
    while (I::packed(args) && ticket < args.tasks && !has_chunks(task_of<I>(args, ticket)));
    s.tickets_ring.wait_empty(published);
    __syncwarp();
    if (ptx::elect_sync()) {
      s.tickets[published.stage] = announced;
      s.tickets_ring.fill(published);
    }
    published.advance();
  }
  // The decays' warps want the ticket of chunk c + 2 before they hand over chunk c, and a scanner
  // may keep chunk c's stage until it has the weights of chunk c + 1. So a task is announced before
  // the loader waits for the first stage of the task in front: it has then loaded chunk c at most,
  // whose stage was chunk c - kStages's, and that one needs the weights of chunk c - 1 at most.
  // (The first task's first stages are free: there, what comes next is found when they are filled.)
  MAMBA2_DEVICE void run() {
    static_assert(kStages >= 2, "see above");
    ptx::griddepcontrol_wait();  // what the scanners read themselves comes after these loads
    Walk<I> walk;
    Unit units[kUnits];
    int ticket = -1;
    announced = known_ticket<I>(args);
    bool first_stages = false;  // are being filled
    walk.chunk.i_seq = -1;
    for (;;) {
      if (announced < 0 && !first_stages) announce_after(ticket);
      if (!walk.exists()) {
        if (announced >= args.tasks) break;
        first_stages = ticket < 0;
        ticket = announced, announced = -1;
        walk.begin(args, ticket);
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half)
          units[half] = uniform(unit_of<kUnits>(args, walk.task.pair, half));
        continue;
      }
      const Chunk next = walk.following(args);
      fill(walk, units, next);
      walk.go_to(next);
      if (at.stage == 0 || !walk.exists()) first_stages = false;
    }
    s.ring.wait_empty(at);
    __syncwarp();
    if (ptx::elect_sync()) {
      s.info[at.stage].flags = kExit;
      s.ring.fill(at);
    }
  }
};

// chunk_cumsum of a pair, and for every token one exponential of each kind:
//   2^a_i for the rows of S C^T, 2^(a_q - a_j) delta_j for what enters the state, and
//   2^(a_e - a_j) delta_j up to the end e of the token's block of 16, for the blocks below the
//   diagonal: with 2^(a_i - a_e) of the row, both factors are at most 1.
// kBuffers warps take chunks in turn, each for a buffer of weights of its own, so that dt of a
// warp's next chunk has the time of two chunks to arrive. A lane has tokens 2 lane and 2 lane + 1.
template <class I>
struct Decays {
  using T = typename I::T;
  static constexpr int kUnits = I::kUnits, kStages = stages_of<I>();
  using Smem = SmemOf<I>;
  static_assert(kQ == 64, "two tokens a lane");
  const FusedScanArgs& args;
  Smem& s;
  const int buffer, lane;
  Walk<I> walk{};
  tile::RingPosition<kTaskSlots> tickets;
  bool more = true;  // walk is at a chunk, or before the first
  struct HalfInputs {
    uint32_t dt_bits[2] = {0, 0};
  };
  struct Inputs {
    HalfInputs of[kUnits];
    float parameter = 0.f;  // lane kUnits k + half: of a head, A (k = 0) and the bias (k = 1)
    bool reset[2] = {false, false};
    int count = 0;
    bool backwards = false;
  };
  int head[kUnits] = {};
  int known = -1;  // a ticket that was not announced
  Inputs next;     // of walk's chunk, dt on its way

  MAMBA2_DEVICE Decays(const FusedScanArgs& args, Smem& s, int buffer, int lane)
      : args(args), s(s), buffer(buffer), lane(lane) {}

  MAMBA2_DEVICE void begin_tasks() {  // up to one that has chunks
    while (more && !walk.exists()) {
      int ticket = known;
      known = -1;
      if (ticket < 0) {
        s.tickets_ring.wait_full(tickets);
        ticket = s.tickets[tickets.stage];
        s.tickets_ring.release(tickets);
        tickets.advance();
      }
      more = ticket < args.tasks;
      if (!more) return;
      walk.begin(args, ticket);
      MAMBA2_UNROLL
      for (int half = 0; half < kUnits; ++half) {
        const Unit unit = unit_of<kUnits>(args, walk.task.pair, half);
        head[half] = half > 0 && !unit.active ? head[0] : unit.head;  // idle: any that exists
      }
      // Loads of different lanes, so that one latency is all that it takes.
      const AnyFloat A = I::steps(args).A, bias = I::steps(args).dt_bias;
      const bool is_bias = (lane & kUnits) != 0;
      const AnyFloat from{is_bias ? bias.ptr : A.ptr, is_bias ? bias.dtype : A.dtype};
      const int i_h = lane & (kUnits - 1) ? head[kUnits - 1] : head[0];
      next.parameter = from ? mamba2::load<float>(from, i_h) : 0.f;
    }
  }
  MAMBA2_DEVICE void step_over(int chunks) {
    if (walk.exists()) {  // seldom not in one step
      const Chunk there = walk.following(args, chunks);
      if (there.i_seq >= 0) return walk.go_to(there, chunks);
    }
    MAMBA2_NO_UNROLL
    for (int k = 0; k < chunks && more; ++k) {
      if (walk.exists()) walk.go_to(walk.following(args));
      begin_tasks();
    }
  }
  MAMBA2_DEVICE void fetch() {
    if (!more) return;
    const StepInputs steps = I::steps(args);
    const Chunk& c = walk.chunk;
    MAMBA2_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int t = 2 * lane + k < c.count ? 2 * lane + k : c.count - 1;
      const int64_t at = c.row * steps.dt.b + int64_t(c.token + t) * steps.dt.l;
      MAMBA2_UNROLL
      for (int half = 0; half < kUnits; ++half)
        next.of[half].dt_bits[k] =
            load_bits(steps.dt.ptr, steps.dt_dtype, at + head[half] * steps.dt.h);
      if (steps.seq_idx) next.reset[k] = resets(steps, c.row, c.token + t);
    }
    next.count = c.count, next.backwards = walk.task.backwards;
  }
  struct Sums {
    float a[2], delta[2];
  };
  MAMBA2_DEVICE Sums sums_of(const HalfInputs& in, int half, float parameter,
                             const bool (&reset)[2], int count) const {
    Sums sums;
    const StepInputs steps = I::steps(args);
    const float A = __shfl_sync(~0u, parameter, half);
    const float bias = __shfl_sync(~0u, parameter, kUnits + half);
    MAMBA2_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float dt = float_of_bits(steps.dt_dtype, in.dt_bits[k]);
      const Step step = fast_step_of(steps, dt, bias, A, reset[k]);
      sums.delta[k] = 2 * lane + k < count ? step.delta : 0.f;
      sums.a[k] = 2 * lane + k < count ? step.a_log2 : 0.f;
    }
    const float up_to = inclusive_sum(sums.a[0] + sums.a[1], lane);
    const float before = __shfl_up_sync(~0u, up_to, 1);
    if (lane > 0) sums.a[0] += before;
    sums.a[1] = up_to;
    return sums;
  }
  MAMBA2_DEVICE void store(const Sums& of, Weights<T, kUnits>& weights, int half,
                           bool backwards) const {
    const float *a = of.a, *delta = of.delta;
    const float a_q = __shfl_sync(~0u, a[1], 31), a_block = __shfl_sync(~0u, a[1], lane | 7);
    const auto pair = [&](float* values) -> float2& {
      return reinterpret_cast<float2*>(values)[lane];
    };
    pair(weights.a_log2[half]) = make_float2(a[0], a[1]);
    weights.input_weight[half].pair(lane) =
        make_float2(ptx::ex2(a_q - a[0]) * delta[0], ptx::ex2(a_q - a[1]) * delta[1]);
    if (backwards) return;
    pair(weights.delta[half]) = make_float2(delta[0], delta[1]);
    pair(weights.column_weight[half]) =
        make_float2(ptx::ex2(a_block - a[0]) * delta[0], ptx::ex2(a_block - a[1]) * delta[1]);
    weights.row_decay[half].pair(lane) = make_float2(ptx::ex2(a[0]), ptx::ex2(a[1]));
  }
  MAMBA2_DEVICE void run() {
    ptx::griddepcontrol_wait();
    walk.chunk.i_seq = -1;
    known = known_ticket<I>(args);
    tile::RingPosition<kBuffers> to{buffer};
    bool fetched = false;
    for (int skip = buffer + 1;; skip = kBuffers) {
      const Inputs now = next;
      step_over(skip);
      fetch();
      if (fetched) {
        Sums sums[kUnits];
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half)
          sums[half] = sums_of(now.of[half], half, now.parameter, now.reset, now.count);
        s.weights_ring.wait_empty(to);
        MAMBA2_UNROLL
        for (int half = 0; half < kUnits; ++half)
          store(sums[half], s.weights[buffer], half, now.backwards);
        s.decays_ring.fill(to);
        s.weights_ring.fill(to);
        to.phase ^= 1;
      }
      if (!more) return;
      fetched = true;
    }
  }
};

// One warp: y of both units to global memory, by bulk stores, or row by row where a neighbour
// follows.
template <class I>
struct Storer {
  using T = typename I::T;
  static constexpr int kUnits = I::kUnits, kStages = stages_of<I>();
  using Smem = SmemOf<I>;
  const FusedScanArgs& args;
  Smem& s;
  const int lane;

  MAMBA2_DEVICE void store(const StageInfo& info, const Unit& unit, const T* tile) const {
    if (!I::packed(args) || info.count == kQ) {
      if (lane > 0) return;
      ptx::tma_store_4d(&args.y, unit.p_block * kP, unit.head, info.token, info.row, tile);
      ptx::bulk_commit_group();
      return;
    }
    T* y = static_cast<T*>(args.y_out.ptr) + info.token * args.y_out.l + unit.head * args.y_out.h +
           unit.p_block * kP;
    MAMBA2_NO_UNROLL
    for (int i = lane; i < info.count * 8; i += 32) {
      if (!I::kPlain && unit.p_block * kP + i % 8 * 8 >= args.p) continue;
      *reinterpret_cast<uint4*>(y + i / 8 * args.y_out.l + i % 8 * 8) =
          *static_cast<const uint4*>(tile::panel_address(tile, i / 8, i % 8 * 8));
    }
  }
  MAMBA2_DEVICE void run() {
    tile::RingPosition<kStages> at;
    tile::RingPosition<kBuffers> from;
    for (;; at.advance()) {
      s.ring.wait_full(at);
      const StageInfo info = s.info[at.stage];
      if (info.flags & kExit) break;
      s.ring.release(at);  // its info may be written anew
      if (info.flags & kBackwards) continue;
      MAMBA2_NO_UNROLL
      for (int half = 0; half < kUnits; ++half) {
        const Unit unit = unit_of<kUnits>(args, info.pair, half);
        s.y_ring[half].wait_full(from);
        if (unit.active) store(info, unit, s.y[from.stage][half]);
      }
      ptx::bulk_wait_group_read<0>();
      for (int half = 0; half < kUnits; ++half) s.y_ring[half].release(from);
      from.advance();
    }
    ptx::bulk_wait_group<0>();
  }
};

}  // namespace mamba2::ssd::sm90
