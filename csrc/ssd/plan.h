// Which kernels run a problem, chosen from its sizes and the card alone. No timing, no torch, no
// CUDA.
#pragma once
#include <cstdint>

#include "shape.h"

namespace mamba2::ssd {

enum class Tier : int { any = 1, sm80 = 2, sm90 = 3 };

// The card, as far as plans care. `major` 0: no card (the CPU).
struct Device {
  int major = 0, minor = 0, sm_count = 1;
};

// Cards whose blocks may have 99 KB of shared memory, not 163 or more.
inline bool has_small_smem(const Device& device) {
  return device.major == 8 ? device.minor != 0 && device.minor != 7 : device.major >= 12;
}

// The private integer of the op schemas: 0 chooses.
//   bits 0..3  force a Tier; bits 4..7 force a variant of it; bit 8 batch invariant.
constexpr int kPlanTierMask = 0xf, kPlanVariantShift = 4, kPlanVariantMask = 0xf;
constexpr int kPlanBatchInvariant = 1 << 8;

// Tier sm80's chunk length. At p 64, n 128 a token of a head costs 2 p + (p n) / q elements of x, y
// and states a pass, and q (p + n) multiply-adds inside its chunk (half of them skipped): with 64
// the states outweigh x, with 256 the products inside the chunk outweigh everything else.
constexpr int kChunkTokensSm80 = 128;

struct Problem {
  Shape shape;
  DType dtype = DType::f32;
  bool backward = false;
  bool has_z = false;
  bool save_states = false;
  bool D_per_channel = false;
};

// Tier sm90: the most runs that a row is cut into if every run sums up itself what comes before it.
constexpr int kMaxRuns = 4;

struct Plan {
  Tier tier = Tier::any;
  int q = 64;                    // chunk length, tokens
  int variant = 0;               // tier's own
  int segment_chunks = 0;        // chunks per segment (0: whole sequences)
  int run_ends[kMaxRuns] = {};   // tier sm90: where a row's runs end, chunks (0: no more runs)
  bool batch_invariant = false;  // nothing may depend on b or on what a sequence is packed with
  const char* reason = "";
};

// Throws nothing; a forced tier that cannot take the problem gives tier any with a reason.
Plan make_plan(const Problem& problem, const Device& device, int forced);

}  // namespace mamba2::ssd
