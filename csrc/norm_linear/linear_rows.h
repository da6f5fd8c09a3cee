// linear_rows: a projection of the rows of a decoding step, y = x weight^T, whose weights are on
// their way before the rows are made. Of Params it takes b, d, o, x, weight, out, early_weights.
#pragma once
#include "norm_linear.h"

namespace mamba2::norm_linear {

// Returns a cudaError_t as int.
int run_linear_rows(const Params&, void* stream);

}  // namespace mamba2::norm_linear
