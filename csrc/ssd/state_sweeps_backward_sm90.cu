// state_sweeps (sm_90a): the states S that enter chunks and the gradients G of those that leave.
//
//   S <- 2^a_q S + sum_j 2^(a_q - a_j) delta_j x_j B_j^T     forward in time, from initial_states
//   G <- 2^a_q G + sum_i 2^a_i dy_i C_i^T                    backward in time, from d_final_states
//
// Both are one loop: a state (64 p, n) in the fp32 accumulators of a warpgroup; chunk by chunk it
// is written out as it is, rounded, then scaled and added to, half a chunk at a time: weights just
// below 1 all round one way, and the more so the more tokens they span. The A operand is the
// transpose of the tokens' tile, weighted in registers; the B operand the tile of B or C, shared by
// a block's heads.
//
// A weighted token is rounded a second time. Where decay is weak that is most of the error of dA,
// dB and dC, and so it is multiplied in two words of 16 bits there; elsewhere only the 16 tokens
// next to where the state is handed on are, since by the time it is, little is left of the others.
//
// Where all blocks are on the card at once (beside_sweeps), chunks whose states are stored are
// counted, for chunk_scan_backward, which then works on them beside the sweeps.
//
// grid: (sequences x sets of 2 or 3 heads, directions: both, or one); a producer warp and a
// consumer warpgroup a head. Shared memory: 4 or 3 stages x (64 tokens of B or C, x or dy of the
// heads) + two images a head: 195 or 220 KB at n = 128. Bound by HBM: per head and chunk 16 KB read
// and 16 KB written in each direction; where blocks are few, by the steps of one.
#include <algorithm>

#include "../core/launch.h"
#include "state_sweeps_backward_sm90.cuh"

namespace mamba2::ssd::sm90 {
namespace sweeps {

template <class T, int kN, int kHeads, bool kReverse>
struct Consumer {
  using Smem = SweepSmem<T, kN, kHeads>;
  using Stage = SweepStage<T, kN, kHeads>;
  const BackwardArgs& args;
  Smem& s;
  const Sweep& sweep;
  const int i, thread, head, tensor_head;  // i: which of the block's heads
  const bool active;
  const tile::Lane me;
  tile::RingPosition<stages_of(kHeads)> at;
  float state[kN / 2];

  MAMBA2_DEVICE Consumer(const BackwardArgs& args, Smem& s, const Sweep& sweep)
      : args(args),
        s(s),
        sweep(sweep),
        i(threadIdx.x / tile::kWarpgroup),
        thread(threadIdx.x % tile::kWarpgroup),
        head(sweep.first_head + i),
        tensor_head(args.tensor_head(head)),
        active(i < sweep.heads),
        me(threadIdx.x) {}

  MAMBA2_DEVICE void barrier() { ptx::bar_sync(kHeadBarriers + i, tile::kWarpgroup); }
  // f(e, where): this thread's pairs of elements e, e + 1 of a tensor (nseq, tensor_h, p, n).
  template <class F>
  MAMBA2_DEVICE void for_each_pair(F&& f) const {
    const int64_t heads_before = int64_t(sweep.i_seq) * args.tensor_h + tensor_head;
    const int64_t first_row = heads_before * args.p + args.channel(head);
    const int channels = args.channels(head);
    MAMBA2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = me.row(half);
      if (row >= channels) continue;
      const int64_t at = (first_row + row) * args.tensor_n + me.column(0);
      MAMBA2_UNROLL
      for (int k = 0; k < kN / 8; ++k) f(4 * k + 2 * half, at + 8 * k);
    }
  }

  template <class From>
  MAMBA2_DEVICE void load_state(const From* from) {
    for_each_pair([&](int e, int64_t at) {
      state[e] = convert<float>(from[at]);
      state[e + 1] = convert<float>(from[at + 1]);
    });
  }
  MAMBA2_DEVICE void begin() {
    MAMBA2_UNROLL
    for (int e = 0; e < kN / 2; ++e) state[e] = 0;
    if (kReverse) {
      if (args.d_final_states) load_state(args.d_final_states);
    } else if (args.initial_states.ptr) {
      if (args.initial_states.dtype == DType::f32)
        load_state(static_cast<const float*>(args.initial_states.ptr));
      else
        load_state(static_cast<const T*>(args.initial_states.ptr));
    }
  }
  MAMBA2_DEVICE void end() {
    if (!kReverse || !args.d_initial_states) return;
    for_each_pair([&](int e, int64_t at) {
      *reinterpret_cast<float2*>(args.d_initial_states + at) = float2{state[e], state[e + 1]};
    });
  }

  // D as (h, 64) fp32, for the next kernel, blocks of which may begin with any sequence.
  MAMBA2_DEVICE void spread_D() const {
    if (blockIdx.y > 0 || (sweep.i_seq > 0 && !args.progress) || thread >= kHeadDim) return;
    const int channel = args.D_per_channel ? args.channel(head) + thread : 0;
    const int width = args.D_per_channel ? args.p : 1;
    const bool exists = args.D.ptr && thread < args.channels(head);
    args.D_rows[head * kHeadDim + thread] =
        exists ? load<float>(args.D, tensor_head * width + channel) : 0.f;
  }
  // The state as it is, rounded, to its place in memory; and the chunk's weights to shared memory.
  MAMBA2_DEVICE void write_state(int chunk, const Scalars& scalars, int parity) {
    const float weight = scalars.weight(kReverse);
    const float next = __shfl_down_sync(kAllLanes, weight, 1);
    if (thread % 2 == 0) s.weight[parity][i][thread / 2] = split_weights<T>(weight, next);
    if (thread % kBlock == Scalars::planner(kReverse))
      s.plan[parity][i][thread / kBlock] = scalars.plan(kReverse);
    T* image = s.image[parity][i];
    MAMBA2_UNROLL
    for (int step = 0; step < kN / 16; ++step) {
      const float* e = state + 8 * step;
      const uint32_t r[4] = {pack2<T>(e[0], e[1]), pack2<T>(e[2], e[3]), pack2<T>(e[4], e[5]),
                             pack2<T>(e[6], e[7])};
      tile::store_fragment(image + step / 4 * kHeadDim * 64, r, step % 4, me);
    }
    ptx::fence_proxy_async_shared();
    if (thread == 0) {  // the other image has been read, and what lay here before is stored
      ptx::bulk_wait_group_read<0>();
      ptx::bulk_wait_group<1>();
    }
    barrier();
    if (thread == 0) {
      T* out = static_cast<T*>(kReverse ? args.d_states : args.states);
      ptx::bulk_store(out + args.head_at(chunk, head) * (kHeadDim * kN), image,
                      sizeof(T) * kHeadDim * kN);
      ptx::bulk_commit_group();
    }
  }

  // K = 2^a_q <G, S> from unrounded states: of the sequence's last chunk, where G is
  // d_final_states, for in a short sequence nothing else carries the gradient of the decay; of its
  // first, where S is initial_states, for a state may stay what it was.
  MAMBA2_DEVICE void write_through(int chunk, float a_last_log2, const float* other) {
    float sum = 0;
    for_each_pair(
        [&](int e, int64_t at) { sum += state[e] * other[at] + state[e + 1] * other[at + 1]; });
    MAMBA2_UNROLL
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (me.lane == 0) s.through[i][me.warp] = sum;
    barrier();
    const float (&parts)[4] = s.through[i];
    if (thread == 0)
      args.through[args.head_at(chunk, head)] =
          (parts[0] + parts[1] + parts[2] + parts[3]) * ptx::ex2(a_last_log2);
  }

  // The nearest steps of a block before and after weighing, to find their second words from.
  struct Nearest {
    uint32_t v[4 * kMostSeconds], weighed[4 * kMostSeconds];
    PairWeights weight[2 * kMostSeconds];
    MAMBA2_DEVICE void rests(uint32_t (&rest)[4 * kMostSeconds]) const {
      MAMBA2_UNROLL
      for (int r = 0; r < 4 * kMostSeconds; ++r)
        rest[r] = weigh_pair_rest<T>(v[r], weight[r / 2], weighed[r]);
    }
  };
  // The product of as many steps' second words as are planned, behind that of the first words; and
  // the end of both.
  template <class MultiplyRests>
  MAMBA2_DEVICE void finish_block(int planned, const MultiplyRests& multiply_rests) {
    const int seconds = tile::uniform(planned);
    if (seconds == 1)
      multiply_rests(std::integral_constant<int, 1>{});
    else if (seconds == 2)
      multiply_rests(std::integral_constant<int, kMostSeconds>{});
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(state);
  }
  // state = decay state + tokens^T diag(weight) operand, over one block of 64 tokens, a step of the
  // product after another, from the nearest to the chunk's other end on. What second words want is
  // done while the product of the first ones runs, where there are registers for it.
  MAMBA2_DEVICE void add_block(const Stage& stage, const PairWeights* weight,
                               const BlockPlan& plan) {
    constexpr int kPairs = kTokensAStep / 2;
    constexpr bool kEarly = kHeads > 2;
    constexpr int first = kReverse ? 0 : kSteps - 1, onward = kReverse ? 1 : -1;
    const float decay = plan.decay;
    const int planned = plan.seconds;
    MAMBA2_UNROLL
    for (float& e : state) e *= decay;
    uint32_t a[4 * kSteps], rest[4 * kMostSeconds];
    MAMBA2_UNROLL
    for (int k = 0; k < kSteps; ++k)
      tile::load_transposed<1>(reinterpret_cast<uint32_t (&)[4]>(a[4 * k]),
                               stage.tokens[i] + (first + k * onward) * (kTokensAStep * kHeadDim),
                               me);
    Nearest nearest;
    MAMBA2_UNROLL
    for (int r = 0; r < 4 * kSteps; ++r) {
      const PairWeights w = weight[(first + r / 4 * onward) * kPairs + me.column(r % 4 / 2) / 2];
      const uint32_t v = a[r];
      a[r] = weigh_pair<T>(v, w);
      if (r < 4 * kMostSeconds)
        nearest.v[r] = v, nearest.weighed[r] = a[r], nearest.weight[r / 2] = w;
    }
    if (kEarly) nearest.rests(rest);
    const tile::MnMajor<kBlock> operand{stage.operand};
    const auto multiply = [&](int k, const uint32_t* words) {
      ptx::WgmmaRs<T, kN, true>::run(state, words + 4 * k, operand.at(first + k * onward), true);
    };
    ptx::wgmma_fence_operand(state);
    ptx::wgmma_fence();
    MAMBA2_UNROLL
    for (int k = 0; k < kSteps; ++k) multiply(k, a);
    ptx::wgmma_commit_group();
    const auto multiply_rests = [&](auto count) {
      if (!kEarly) nearest.rests(rest);
      ptx::wgmma_fence();
      MAMBA2_UNROLL
      for (int k = 0; k < count(); ++k) multiply(k, rest);
      ptx::wgmma_commit_group();
    };
    finish_block(planned, multiply_rests);
  }

  // The same, tokens weighed and second words found a step at a time while the product of the steps
  // before runs. At n = 64, where a step is short, this is slower.
  MAMBA2_DEVICE void add_block_by_steps(const Stage& stage, const PairWeights* weight,
                                        const BlockPlan& plan) {
    constexpr int kFirstNear = kReverse ? 0 : kSteps - kMostSeconds;
    constexpr int kNearest = kReverse ? 0 : kMostSeconds - 1;  // of these
    const float decay = plan.decay;
    const int planned = plan.seconds;
    MAMBA2_UNROLL
    for (float& e : state) e *= decay;
    uint32_t a[4 * kSteps], rest[4 * kMostSeconds];
    PairWeights w[2 * kSteps];
    tile::load_transposed<kSteps>(a, stage.tokens[i], me);
    MAMBA2_UNROLL
    for (int k = 0; k < 2 * kSteps; ++k) w[k] = weight[me.column(k) / 2];
    const auto weigh = [&](int step) {
      MAMBA2_UNROLL
      for (int r = 4 * step; r < 4 * step + 4; ++r) {
        const uint32_t v = a[r];
        a[r] = weigh_pair<T>(v, w[r / 2]);
        const int near = r - 4 * kFirstNear;
        if (0 <= near && near < 4 * kMostSeconds)
          rest[near] = weigh_pair_rest<T>(v, w[r / 2], a[r]);
      }
    };
    const tile::MnMajor<kBlock> operand{stage.operand};
    const auto multiply = [&](const uint32_t* words, int step) {
      ptx::WgmmaRs<T, kN, true>::run(state, words, operand.at(step), true);
    };
    weigh(0);
    ptx::wgmma_fence_operand(state);
    MAMBA2_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_fence();
      multiply(a + 4 * step, step);
      if (step + 1 < kSteps) weigh(step + 1);
    }
    ptx::wgmma_commit_group();
    const auto multiply_rests = [&](auto count) {
      ptx::wgmma_fence();
      multiply(rest + 4 * kNearest, kFirstNear + kNearest);
      if (count() > 1) multiply(rest + 4 - 4 * kNearest, kFirstNear + 1 - kNearest);
      ptx::wgmma_commit_group();
    };
    finish_block(planned, multiply_rests);
  }

  // Rows that belong to the next sequence become zero.
  MAMBA2_DEVICE void clear_tail(Stage& stage, int count) {
    for (int panel = 0; panel < kN / 64; ++panel)
      tile::zero_rows<kBlock>(stage.operand + panel * kBlock * 64, count, threadIdx.x,
                              consumer_threads(kHeads));
    if (active) tile::zero_rows<kBlock>(stage.tokens[i], count, thread, tile::kWarpgroup);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kTailBarrier, consumer_threads(kHeads));
  }

  MAMBA2_DEVICE void run() {
    if (active) spread_D();
    if (active) begin();
    Scalars next;
    if (active && sweep.chunks > 0) next = Scalars(args, sweep.number(0), tensor_head, thread);
    for (int k = 0; k < sweep.chunks; ++k) {
      const Chunk chunk = sweep.chunk(k);
      const Scalars now = next;
      if (active && k + 1 < sweep.chunks)
        next = Scalars(args, sweep.number(k + 1), tensor_head, thread);
      if (active) {
        write_state(sweep.number(k), now, k & 1);
        if (!kReverse && args.K_by_forward_sweep(chunk))
          write_through(sweep.number(k), now.a_last_log2, args.d_final_states);
        if (kReverse && args.K_by_reverse_sweep(chunk))
          write_through(sweep.number(k), now.a_last_log2,
                        static_cast<const float*>(args.initial_states.ptr));
      }
      if (k == sweep.added) break;
      for (int step = 0; step < blocks_of(chunk); ++step) {
        const int block = block_of(chunk, sweep, step);
        auto& stage = s.stage[at.stage];
        const int count = chunk.count - block * kBlock;
        ptx::mbarrier_wait(&s.ring.full[at.stage], at.phase);
        if (args.chunking.table && count < kBlock) clear_tail(stage, count);
        if (active) {
          const PairWeights* weight = s.weight[k & 1][i] + block * kBlock / 2;
          const BlockPlan& plan = s.plan[k & 1][i][block];
          if constexpr (kN > 64)
            add_block_by_steps(stage, weight, plan);
          else
            add_block(stage, weight, plan);
        }
        arrive_warp(&s.ring.empty[at.stage], me.lane);
        at.advance();
      }
    }
    if (active) end();
    if (thread > 0) return;
    ptx::bulk_wait_group<0>();
    ptx::mbarrier_arrive(&s.all_stored);
  }
};

template <class T, int kN, int kHeads>
__global__ void MAMBA2_LAUNCH_BOUNDS(threads_of(kHeads), 1)
    state_sweeps_kernel(const MAMBA2_GRID_CONSTANT BackwardArgs args, bool reverse_only) {
#if MAMBA2_SM90A
  auto& s = *static_cast<SweepSmem<T, kN, kHeads>*>(ptx::dynamic_smem());
  constexpr int kConsumerThreads = consumer_threads(kHeads);
  if (threadIdx.x == 0) {
    s.ring.init(1, kWarpArrivals * (kConsumerThreads / 32));
    ptx::mbarrier_init(&s.all_stored, kHeads);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (!args.progress) ptx::griddepcontrol_launch_dependents();
  const Sweep sweep(args, kHeads, reverse_only || blockIdx.y == 1);
  // All that a producer loads is there before, unless dy is what a gate has left.
  if (threadIdx.x < kConsumerThreads || reverse_only) ptx::griddepcontrol_wait();
  // Counts must be zero before whoever looks at them begins.
  if (args.progress && threadIdx.x < kConsumerThreads) ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x < kConsumerThreads && sweep.reverse)
    Consumer<T, kN, kHeads, true>(args, s, sweep).run();
  else if (threadIdx.x < kConsumerThreads)
    Consumer<T, kN, kHeads, false>(args, s, sweep).run();
  else if (threadIdx.x == kConsumerThreads)
    produce<T, kN, kHeads>(args, s, sweep);
#endif
}

template <class T, int kN, int kHeads>
int launch_sweeps(const BackwardArgs& args, Sweeps which, void* stream) {
  const unsigned sets = args.g * ceil_div(args.heads_per_group(), kHeads);
  const unsigned directions = which == Sweeps::both ? 2 : 1;
  const LaunchShape at{dim3(sets * args.rows, directions), threads_of(kHeads),
                       sizeof(SweepSmem<T, kN, kHeads>), true,
                       BlockTile{kBlock, kHeadDim, kN, stages_of(kHeads)}};
  return launch(state_sweeps_kernel<T, kN, kHeads>, at, stream, args, which == Sweeps::gradients);
}

// The time of the sweeps with so many heads a block, in units of one head's where all SMs share the
// HBM. A block that has more of it takes no less than alone_cost.
double cost_of(const BackwardArgs& args, int directions, int heads, double alone_cost) {
  const int64_t sets = int64_t(args.g) * ceil_div(args.heads_per_group(), heads);
  const int64_t blocks = sets * args.rows * directions;
  const double last = double(blocks % args.sm_count) / args.sm_count * heads;
  return double(blocks / args.sm_count) * heads + (last > 0 ? std::max(last, alone_cost) : 0.);
}

int heads_of_block(const BackwardArgs& args, int directions) {
  // Alone: as measured at n = 128, with 80 and 54 blocks.
  return cost_of(args, directions, 3, 2.1) < cost_of(args, directions, 2, 1.75) ? 3 : 2;
}

}  // namespace sweeps

Beside beside_sweeps(const BackwardArgs& args, Sweeps which) {
  using namespace sweeps;
  const int64_t sets = args.g * ceil_div(args.heads_per_group(), heads_of_block(args, 2));
  const int64_t blocks = 2 * sets * args.rows;
  // More than one wave: the HBM has no room. One direction alone: no chunk is ready early.
  if (which != Sweeps::both || blocks > args.sm_count) return Beside::none;
  const bool room = 4 * blocks <= 3 * int64_t(args.sm_count);
  return room && args.chunks >= kLongSequence * args.rows ? Beside::from_middle : Beside::in_order;
}

int state_sweeps(const BackwardArgs& args, Sweeps which, DType dtype, void* stream) {
  const Range range("state_sweeps");
  using namespace sweeps;
  const bool by_threes = heads_of_block(args, which == Sweeps::both ? 2 : 1) == 3;
  return dispatch_backward(dtype, args.n, [&](auto element, auto n) {
    using T = decltype(element);
    return by_threes ? launch_sweeps<T, n(), 3>(args, which, stream)
                     : launch_sweeps<T, n(), 2>(args, which, stream);
  });
}

}  // namespace mamba2::ssd::sm90
