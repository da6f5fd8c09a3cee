// The kernel that takes every norm_linear.
#pragma once
#include "norm_linear.h"

namespace mamba2::norm_linear {

int run_any(const Params&, void* stream);

}  // namespace mamba2::norm_linear
