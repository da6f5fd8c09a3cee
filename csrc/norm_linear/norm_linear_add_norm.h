// norm_linear_add_norm: what stands between two layers, for the rows of a decoding step.
//   residual += norm(x) weight^T     norm_linear with a residual (norm_linear.h)
//   y         = norm(residual)       add_norm without x (add_norm.h)
#pragma once
#include <cstddef>

#include "../add_norm/add_norm.h"
#include "norm_linear.h"

namespace mamba2::norm_linear {

// Whether the kernels of norm_linear_add_norm.cu take these; norm_linear and add_norm take all.
bool fits_rows(const Params& product, const add_norm::ForwardParams& next);
std::size_t rows_workspace_bytes(const Params& product);

// ---- CUDA: returns a cudaError_t as int ----
int run_rows(const Params& product, const add_norm::ForwardParams& next, void* workspace,
             void* stream);

}  // namespace mamba2::norm_linear
