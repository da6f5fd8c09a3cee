// What tier sm80 takes and how it cuts long sequences. Depends on sizes alone; no torch, no CUDA.
#include "plan_sm80.h"

#include <algorithm>

#include "tiers.h"

namespace mamba2::ssd::sm80 {

// 16-bit operands, p and n made of 16 x 16 blocks. The backward keeps x and dy of a chunk in shared
// memory, which has no room for p beyond 128, nor, on cards with 99 KB of it, for p beyond 64.
bool supports(const Problem& problem, const Device& device) {
  const auto takes = [](int size) { return size % 16 == 0 && size <= 256; };
  const bool is_16_bit = problem.dtype == DType::bf16 || problem.dtype == DType::f16;
  const int most_p = !problem.backward ? 256 : has_small_smem(device) ? 64 : 128;
  return device.major >= 8 && is_16_bit && takes(problem.shape.p) && takes(problem.shape.n) &&
         problem.shape.p <= most_p;
}

namespace {

constexpr int kSweepP = 64, kSweepN = 128;  // of the state, in a block of a sweep
// Sweeps are cut when they would leave SMs idle, ...
// ... into as many segments as give it so many (three are resident: two waves), ...
constexpr int kBlocksWanted = 6;
// ... none so short that a second pass over x and three launches cost more than they save.
constexpr int kLeastChunks = 32;

// No more splits of a group's heads than leave each so many: partial sums of few heads cost memory
// and traffic.
constexpr int kLeastHeads = 16;
// What a block of chunk_scan_backward does once, C B^T and dCB, in heads.
constexpr int kHeadsOnce = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void plan_segments(const Problem& problem, const Device& device, Plan* plan) {
  if (plan->variant & kShortSegments) {
    plan->segment_chunks = 2;
    return;
  }
  const Shape& shape = problem.shape;
  const int64_t chunks = ceil_div(shape.l, plan->q), sms = std::max(1, device.sm_count);
  const int64_t blocks = std::max<int64_t>(
      1, shape.nseq * shape.h * ceil_div(shape.p, kSweepP) * ceil_div(shape.n, kSweepN));
  if (plan->batch_invariant || blocks >= sms) return;
  const int64_t segments = std::min(kBlocksWanted * sms / blocks, chunks / kLeastChunks);
  if (segments > 1) plan->segment_chunks = static_cast<int>(ceil_div(chunks, segments));
}

// The fewest splits with which the blocks of chunk_scan_backward, one an SM, are done the earliest.
int plan_head_splits(const Problem& problem, const Device& device, const Plan& plan) {
  const Shape& shape = problem.shape;
  const int64_t heads = shape.heads_per_group(), most = ceil_div(heads, kLeastHeads);
  if (plan.batch_invariant) return static_cast<int>(most);
  const int64_t blocks = shape.chunks(plan.q) * shape.g, sms = std::max(1, device.sm_count);
  int64_t best = 1, least_time = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t in_split = ceil_div(heads, splits);
    if (in_split * (splits - 1) >= heads) continue;  // the last one would be empty
    const int64_t time = ceil_div(blocks * splits, sms) * (in_split + kHeadsOnce);
    if (time < least_time) best = splits, least_time = time;
  }
  return static_cast<int>(best);
}

}  // namespace mamba2::ssd::sm80
