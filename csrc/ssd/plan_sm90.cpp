// How the sm_90a forward cuts its work. Depends on sizes alone; no torch, no CUDA.
#include "plan_sm90.h"

#include <algorithm>
#include <string_view>

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
// the times).
bool supports(const Problem& problem, const Device& device) {
  const Shape& s = problem.shape;
  const bool card = device.major == 9 && device.minor == 0 && is_built();
  const bool type = problem.dtype == DType::bf16 || problem.dtype == DType::f16;
  const bool heads = s.p % 8 == 0 && s.p >= 32 && s.p <= 256;
  return card && type && heads && (s.n == 64 || s.n == 128 || s.n == 256);
}

namespace {

// In units of one chunk of one pair (about 1.3 us on an H200):
constexpr double kTaskOverhead = 0.6;       // filling the ring, taking over a state
constexpr double kPassOneShare = 0.55;      // pass one's time beside pass two's
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

template <class Cost>
int64_t cheapest(const Work& w, int64_t longest, Cost cost) {
  int64_t best = longest;
  for (int64_t c = 2; c < longest; ++c)
    if (cost(w, c) < cost(w, best)) best = c;
  return best;
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
  w.state_bytes = 4.0 * units * kP * shape.n;
  plan->q = kQ;

  const int64_t longest = std::min<int64_t>(w.chunks_per_row, 256);
  const int64_t by_ticket = shape.packed || plan->batch_invariant
                                ? w.chunks_per_row
                                : cheapest(w, w.chunks_per_row, ticket_cost);
  const int64_t by_segment = cheapest(w, longest, segment_cost);
  const bool exact_only = plan->batch_invariant;
  bool tickets =
      exact_only || (!shape.packed && ticket_cost(w, by_ticket) <= segment_cost(w, by_segment));
  if (plan->variant == kTickets) tickets = true;
  if (plan->variant == kSegments && !exact_only) tickets = false;
  plan->variant = tickets ? kTickets : kSegments;
  plan->segment_chunks = int(tickets ? by_ticket : by_segment);
  plan->reason = tickets ? "enough heads and rows fill the card: segments in ticket order"
                         : "few heads and rows or packed: segments in parallel, two passes";
}

}  // namespace mamba2::ssd::sm90
