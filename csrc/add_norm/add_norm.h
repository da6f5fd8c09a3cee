// add_norm: the residual takes what a layer adds to it, and is normed for the next layer.
//   residual_out = residual + x  (residual without x)
//   y            = residual_out / sqrt(mean(residual_out^2) + eps) weight
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"

namespace mamba2::add_norm {

struct ForwardParams {
  int64_t b = 0;  // rows
  int d = 0;      // channels
  DType residual_dtype = DType::f32, x_dtype = DType::bf16, dtype = DType::bf16;
  const void* residual = nullptr;  // (b, d) residual_dtype, rows residual_stride elements apart
  const void* x = nullptr;         // (b, d) x_dtype, rows x_stride elements apart; optional
  AnyFloat weight;                 // (d) contiguous
  // (b, d) residual_dtype, rows residual_out_stride elements apart; may be residual itself. Not
  // written without x.
  void* residual_out = nullptr;
  void* y = nullptr;  // (b, d) dtype, contiguous
  int64_t residual_stride = 0, x_stride = 0, residual_out_stride = 0;
  double eps = 0;
};

// All contiguous.
struct BackwardParams {
  int64_t b = 0;
  int d = 0;
  DType residual_dtype = DType::f32, x_dtype = DType::bf16, dtype = DType::bf16;
  const void* dy = nullptr;              // (b, d) dtype
  const void* d_residual_out = nullptr;  // (b, d) residual_dtype; optional
  const void* residual_out = nullptr;    // (b, d) residual_dtype
  AnyFloat weight;                       // (d)
  void* d_residual = nullptr;            // (b, d) residual_dtype
  void* dx = nullptr;                    // (b, d) x_dtype: d_residual, rounded; optional
  void* dweight = nullptr;               // (d) fp32 (fp64 when the arithmetic is)
  double eps = 0;
};

// What the arithmetic runs in: fp32, and fp64 where residual or weight is.
inline DType working_dtype(DType residual, DType weight) {
  return residual == DType::f64 || weight == DType::f64 ? DType::f64 : DType::f32;
}

// ---- CUDA: each returns a cudaError_t as int ----
int forward(const ForwardParams&, void* stream);
std::size_t backward_workspace_bytes(const BackwardParams&);
int backward(const BackwardParams&, void* workspace, void* stream);

}  // namespace mamba2::add_norm
