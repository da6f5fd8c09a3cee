// How the sm_90a forward cuts its work. Depends on sizes alone; no torch, no CUDA.
#include "plan_sm90.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "../core/search.h"
#include "tiers.h"

// As TORCH_CUDA_ARCH_LIST or CMake names them.
#ifndef MAMBA2_ARCHS
#define MAMBA2_ARCHS ""
#endif

namespace mamba2::ssd::sm90 {

constexpr int kQ = 64, kP = 64;

bool is_built() {
  constexpr std::string_view archs = MAMBA2_ARCHS;
  return archs.empty() || archs.find("9.0a") != archs.npos || archs.find("90a") != archs.npos;
}

// Only exactly 9.0 runs this code: later cards have no wgmma. Both directions pad p to 64: from p
// 32 on the forward is still faster than the portable path, which pads less (docs/kernels.md has
// the times). The forward pads n to 64 as well.
bool supports(const Problem& problem, const Device& device) {
  const Shape& s = problem.shape;
  const bool card = device.major == 9 && device.minor == 0 && is_built();
  const bool type = problem.dtype == DType::bf16 || problem.dtype == DType::f16;
  const bool heads = s.p % 8 == 0 && s.p >= 32 && s.p <= 256;
  const bool padded = !problem.backward && s.n < 64 && s.n % 8 == 0 && s.n > 0;
  return card && type && heads && (padded || s.n == 64 || s.n == 128 || s.n == 256);
}

namespace {

// In units of one chunk of one pair (about 1.3 us on an H200):
constexpr double kTaskOverhead = 0.6;       // filling the ring, taking over a state
constexpr double kPassOneShare = 0.55;      // pass one's time beside pass two's
constexpr double kPrefixShare = 0.44;       // the same, of a block beside others in pass two
constexpr double kRunOverhead = 0.4;        // a task that takes over nothing
constexpr double kScanOverhead = 4;         // two more launches, their tails
constexpr double kBytesPerChunkTime = 5e6;  // what segment_scan moves meanwhile, all SMs together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Work {
  int64_t rows, chunks_per_row, pairs, sms;
  double state_bytes;  // one segment's, all units
};

// Tickets: bound by the busiest SM or by the longest chain of segments.
double ticket_cost(const Work& w, int64_t segment_chunks) {
  const int64_t segments = ceil_div(w.chunks_per_row, segment_chunks);
  const double task = segment_chunks + kTaskOverhead;
  return std::max(ceil_div(w.rows * w.pairs * segments, w.sms) * task, segments * task);
}
double segment_cost(const Work& w, int64_t segment_chunks) {
  const int64_t segments = ceil_div(w.rows * w.chunks_per_row, segment_chunks);
  const double waves = double(ceil_div(segments * w.pairs, w.sms));
  return waves * (segment_chunks + kTaskOverhead) * (1 + kPassOneShare) + kScanOverhead +
         3 * segments * w.state_bytes / kBytesPerChunkTime;
}

struct Runs {
  int ends[kMaxRuns] = {};
  double cost = std::numeric_limits<double>::infinity();
};
// A row as a first run of `first` chunks and `later` ones, each of which sums up itself what comes
// before it, and costs as much as the others: `later_cost`, but for the last, which takes what is
// left. `a_block`: how many first runs share a block.
Runs runs_of_row(int64_t row, int later, int64_t a_block, int first, double later_cost) {
  Runs runs;
  runs.ends[0] = first;
  runs.cost = a_block * (first + kRunOverhead);
  for (int k = 1; k <= later; ++k) {
    const int start = runs.ends[k - 1], most = int(row) - (later - k);
    const int length = std::max(1, int(later_cost - kPrefixShare * start));
    runs.ends[k] = k == later ? int(row) : std::min(start + length, most);
    const double cost = kPrefixShare * start + (runs.ends[k] - start) + 2 * kRunOverhead;
    runs.cost = std::max(runs.cost, cost);
  }
  return runs;
}
// Every later run has a block of its own, the first runs share the others. With r = kPrefixShare
// the later runs cost the same if each is (1 - r) of the one before.
Runs cut_rows(const Work& w, int later) {
  Runs best;
  const int64_t rows = w.rows * w.pairs, blocks = w.sms - rows * later, row = w.chunks_per_row;
  if (blocks < 1 || row <= later) return best;
  const int64_t a_block = ceil_div(rows, blocks);
  const double left = std::pow(1 - kPrefixShare, later), share = kPrefixShare / (1 - left);
  const double first = (share * row + (2 - a_block) * kRunOverhead) / (a_block + share * left);
  for (double rounded : {std::floor(first), std::ceil(first)}) {
    const int chunks = int(std::clamp(rounded, 1.0, double(row - later)));
    const Runs runs = runs_of_row(row, later, a_block, chunks, share * (row - chunks * left));
    if (runs.cost < best.cost) best = runs;
  }
  return best;
}
Runs best_runs(const Work& w) {
  Runs best;
  for (int later = 1; later < kMaxRuns; ++later) {
    const Runs runs = cut_rows(w, later);
    if (runs.cost < best.cost) best = runs;
  }
  return best;
}

// Chunks of a task: all of them, or the fewer that cost less.
int64_t best_length(const Work& w, int64_t longest, double (*cost)(const Work&, int64_t)) {
  return cheapest(longest, 2, longest, [&](int64_t c) { return cost(w, c); });
}

}  // namespace

void plan_forward(const Problem& problem, const Device& device, Plan* plan) {
  const Shape& shape = problem.shape;
  const int64_t units = shape.h * ceil_div(shape.p, kP);
  Work w;
  w.rows = std::max<int64_t>(1, shape.packed ? 1 : shape.b);
  w.chunks_per_row = std::max<int64_t>(1, shape.chunks(kQ) / w.rows);
  w.pairs = shape.g * ceil_div(units / shape.g, units_per_block(shape.n));
  w.sms = std::max(1, device.sm_count);
  w.state_bytes = 4.0 * units * kP * padded_n(shape.n);
  plan->q = kQ;

  const int64_t longest = std::min<int64_t>(w.chunks_per_row, 256);
  const int64_t by_ticket = shape.packed || plan->batch_invariant
                                ? w.chunks_per_row
                                : best_length(w, w.chunks_per_row, ticket_cost);
  const int64_t by_segment = best_length(w, longest, segment_cost);
  const bool exact_only = plan->batch_invariant;
  const Runs runs = shape.packed || exact_only ? Runs{} : best_runs(w);
  bool tickets =
      exact_only || (!shape.packed && ticket_cost(w, by_ticket) <= segment_cost(w, by_segment));
  if (plan->variant == kTickets) tickets = true;
  if (plan->variant == kSegments && !exact_only) tickets = false;
  const double others = tickets ? ticket_cost(w, by_ticket) : segment_cost(w, by_segment);
  const bool asked = plan->variant == kPrefixes && runs.ends[0] > 0;
  if (asked || (plan->variant == 0 && runs.cost < others)) {
    plan->variant = kPrefixes;
    plan->segment_chunks = runs.ends[0];
    std::copy(runs.ends, runs.ends + kMaxRuns, plan->run_ends);
    plan->reason = "heads and rows nearly fill the card: few runs a row, each sums up those before";
    return;
  }
  plan->variant = tickets ? kTickets : kSegments;
  plan->segment_chunks = int(tickets ? by_ticket : by_segment);
  plan->reason = tickets ? "enough heads and rows fill the card: segments in ticket order"
                         : "few heads and rows or packed: segments in parallel, two passes";
}

}  // namespace mamba2::ssd::sm90
