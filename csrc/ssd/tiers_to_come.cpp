// Tiers whose kernels do not exist yet: plan.cpp never chooses them. A tier's definitions leave
// this file when its kernels arrive.
#include "tiers.h"

namespace mamba2::ssd {

namespace sm80 {
std::size_t backward_workspace_bytes(const Problem&, const Plan&, const Device&) { return 0; }
int backward(const BackwardParams&, const Plan&, const Device&, void*, void*) { return 1; }
}  // namespace sm80

}  // namespace mamba2::ssd
