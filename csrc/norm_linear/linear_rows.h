// linear_rows: in_proj of the rows of a decoding step, y = x weight^T, and the convolution's step
// (causal_conv1d.h) of those outputs that are its channels, in their place.
#pragma once
#include "../core/macros.h"
#include "norm_linear.h"
#include "row_product.h"

namespace mamba2::norm_linear {

constexpr int kOutputsOfBlock = 32;

// Whether all blocks of b rows and o outputs run at once.
inline bool runs_at_once(int64_t b, int64_t o) {
  return ceil_div(b, kRows) * ceil_div(o, kOutputsOfBlock) <= kSms;
}

struct ConvStep {
  int first = 0, d = 0, w = 0;   // outputs first .. first + d are channels; w 0: no convolution
  void* state = nullptr;         // (b, w - 1, d) bf16, (w - 1, d) contiguous, updated
  int64_t state_stride = 0;      // elements from row to row
  const void* weight = nullptr;  // (d, w) bf16
  const void* bias = nullptr;    // (d) bf16, optional
  bool silu = false;
};

// Of Params it takes b, d, o, x, weight, out and early_weights, which is for the convolution's
// weights and state too. max_smem_bytes: what a block may have of shared memory; the result
// does not depend on it. Returns a cudaError_t as int.
int run_linear_rows(const Params&, const ConvStep&, int max_smem_bytes, void* stream);

}  // namespace mamba2::norm_linear
