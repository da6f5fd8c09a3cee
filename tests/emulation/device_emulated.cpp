// core/device.h for the host emulation, in place of core/device_cuda.cpp: one card, of compute
// capability 9.0, with few SMs, no stream, no device to guard.
#include "../../csrc/core/device.h"
#include "../../csrc/core/launch.h"

namespace mamba2 {
namespace {

Card& emulated_card() {
  static Card card{9, 0, 4, 0};
  return card;
}

}  // namespace

struct OnDevice::Guard {};

OnDevice::OnDevice(const Tensor&) : card_(&emulated_card()) {}
OnDevice::~OnDevice() = default;

void OnDevice::check_launch(const char* op, int error) const {
  check(error == 0, op, ": emulated launch failed: ", launch_error_string(error));
}

}  // namespace mamba2

// How the next launches run; tests call it through ctypes.
extern "C" __attribute__((visibility("default"))) void mamba2_emulation_schedule(
    uint64_t seed, int timing, int resident_blocks, int sm_count, int max_smem_bytes,
    int most_released) {
  auto& o = mamba2::emulation::options();
  o.seed = seed;
  o.launches = 0;
  o.timing = static_cast<mamba2::emulation::Timing>(timing);
  o.resident_blocks = resident_blocks;
  o.most_released = most_released;
  mamba2::emulated_card().sm_count = sm_count;
  mamba2::emulated_card().max_smem_bytes = max_smem_bytes;
}
