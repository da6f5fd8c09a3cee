// norm_linear: a layer's norm and the projection behind it, for the few rows of a decoding step.
//   v = norm(x) norm_weight, with the gate silu(z) as in gated_rmsnorm, rounded to weight's dtype
//   y = v weight^T + bias;  with a residual instead: residual += v weight^T + bias
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstdint>

#include "../core/dtype.h"
#include "../core/macros.h"

namespace mamba2::norm_linear {

// (rows, columns): the element stride of a row, the last dim has stride 1.
struct Matrix {
  const void* ptr = nullptr;
  int64_t stride = 0;
};
struct MatrixOut {
  void* ptr = nullptr;
  int64_t stride = 0;
};

struct Params {
  int64_t b = 0;     // rows
  int d = 0, s = 0;  // channels, and of a group
  int o = 0;         // outputs
  DType x_dtype = DType::f32, dtype = DType::bf16, out_dtype = DType::bf16;
  Matrix x, z;                   // (b, d) x_dtype, z optional
  AnyFloat norm_weight;          // (d)
  const void* weight = nullptr;  // (o, d) dtype, contiguous
  AnyFloat bias;                 // (o), optional
  MatrixOut out;                 // (b, o) out_dtype
  bool add = false;              // out += instead of out =
  double eps = 0;
  bool norm_before_gate = false;
  // The kernel in front writes no weights: they may be read before its end.
  bool early_weights = false;
};

// The gate silu(z) stands before the norm or behind it; 1 where it does not stand.
template <class U>
struct Gate {
  U inside = 1, outside = 1;
};
template <class U>
MAMBA2_HD Gate<U> gate_of(U silu, bool norm_before_gate) {
  return norm_before_gate ? Gate<U>{U(1), silu} : Gate<U>{silu, U(1)};
}

// ---- CUDA: returns a cudaError_t as int ----
int run(const Params&, void* stream);

}  // namespace mamba2::norm_linear
