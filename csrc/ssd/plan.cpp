// Which tier takes which problem, and how a plan is chosen. Depends on no torch and no CUDA, so
// that `explain` answers on any machine.
#include "plan.h"

#include "plan_sm80.h"
#include "plan_sm90.h"
#include "tiers.h"

namespace mamba2::ssd {

// ---- what each tier takes: its kernels' instances, in words of sizes ----

// The last tier: every type and size that passed the checks.
bool any::supports(const Problem&, const Device&) { return true; }

namespace {

bool supports(Tier tier, const Problem& problem, const Device& device) {
  switch (tier) {
    case Tier::sm90:
      return sm90::supports(problem, device);
    case Tier::sm80:
      return sm80::supports(problem, device);
    default:
      return any::supports(problem, device);
  }
}

Plan plan_of(Tier tier, int forced, const char* reason) {
  Plan plan;
  plan.tier = tier;
  if (tier == Tier::sm80) plan.q = kChunkTokensSm80;
  plan.variant = (forced >> kPlanVariantShift) & kPlanVariantMask;
  plan.batch_invariant = (forced & kPlanBatchInvariant) != 0;
  plan.reason = reason;
  return plan;
}

Plan chosen_tier(const Problem& problem, const Device& device, int forced) {
  const int tier = forced & kPlanTierMask;
  if (tier != 0) {
    const bool known = tier <= static_cast<int>(Tier::sm90);
    if (known && supports(static_cast<Tier>(tier), problem, device)) {
      return plan_of(static_cast<Tier>(tier), forced, "the tier that was asked for");
    }
    return plan_of(Tier::any, forced, "the tier that was asked for does not take this problem");
  }
  if (supports(Tier::sm90, problem, device)) {
    return plan_of(Tier::sm90, forced, "wgmma and TMA: 16-bit, a card of compute capability 9.0");
  }
  if (supports(Tier::sm80, problem, device)) {
    const bool lacks_sm90 = device.major == 9 && device.minor == 0 && !sm90::is_built();
    return plan_of(Tier::sm80, forced,
                   lacks_sm90 ? "mma.sync: this build has no code for 9.0a, which wgmma needs"
                              : "mma.sync: 16-bit, sizes that its tiles divide");
  }
  return plan_of(Tier::any, forced, "plain loops: no tensor-core kernel takes this type or size");
}

}  // namespace

Plan make_plan(const Problem& problem, const Device& device, int forced) {
  Plan plan = chosen_tier(problem, device, forced);
  if (plan.tier == Tier::sm80) sm80::plan_segments(problem, device, &plan);
  if (plan.tier == Tier::sm90 && !problem.backward) sm90::plan_forward(problem, device, &plan);
  return plan;
}

}  // namespace mamba2::ssd
