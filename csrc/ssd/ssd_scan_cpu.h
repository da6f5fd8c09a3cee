// The CPU's two directions of ssd_scan; a segment's state is the forward without y.
#pragma once
#include "params.h"

namespace mamba2::ssd::cpu {

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

}  // namespace mamba2::ssd::cpu
