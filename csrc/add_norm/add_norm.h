// add_norm: the residual takes what a layer adds to it, and is normed for the next layer.
//   residual += x (when given);  y = residual / sqrt(mean(residual^2) + eps) weight
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstdint>

#include "../core/dtype.h"

namespace mamba2::add_norm {

struct Params {
  int64_t b = 0;  // rows
  int d = 0;      // channels
  DType residual_dtype = DType::f32, x_dtype = DType::bf16, dtype = DType::bf16;
  void* residual = nullptr;      // (b, d) residual_dtype, rows residual_stride elements apart
  const void* x = nullptr;       // (b, d) x_dtype, rows x_stride elements apart; optional
  const void* weight = nullptr;  // (d) dtype
  void* y = nullptr;             // (b, d) dtype, contiguous
  int64_t residual_stride = 0, x_stride = 0;
  double eps = 0;
};

// ---- CUDA: returns a cudaError_t as int ----
int run(const Params&, void* stream);

}  // namespace mamba2::add_norm
