// core/device.h for the host emulation: one card of compute capability 9.0 with few SMs, no streams.
#include "core/device.h"

#include "core/launch.h"

namespace mamba2 {

struct OnDevice::Guard {};

OnDevice::OnDevice(const Tensor& t) : index_(t.get_device_index()) {
  static const Card card{9, 0, 4};
  card_ = &card;
}
OnDevice::~OnDevice() = default;

void OnDevice::check_launch(const char* op, int error) const {
  check(error == 0, op, ": emulated launch failed: ", launch_error_string(error));
}

}  // namespace mamba2
