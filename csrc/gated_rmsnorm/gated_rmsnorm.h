// gated_rmsnorm: the normalisation after the scan, over groups of s channels.
//   gate inside:  v = x silu(z),  y = v r weight             (v = x without z)
//   gate outside: v = x,          y = v r weight silu(z)     (norm_before_gate)
//   r = 1 / sqrt(mean of v^2 over the group + eps)
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/dtype.h"
#include "../core/rows.h"

namespace mamba2::gated_rmsnorm {

struct Inputs {
  int64_t b = 0, l = 0;
  int d = 0, s = 0;          // channels, and of a group
  DType dtype = DType::f32;  // x, z, y
  Rows x, z;                 // (b, l, d), z optional
  AnyFloat weight;           // (d) contiguous
  double eps = 0;
  bool norm_before_gate = false;
};

struct ForwardParams {
  Inputs in;
  RowsOut y;  // (b, l, d)
};

struct BackwardParams {
  Inputs in;
  Rows dy;                  // (b, l, d)
  RowsOut dx, dz;           // (b, l, d), dz when z is given
  void* dweight = nullptr;  // (d) fp32 (fp64 when dtype is)
};

// ---- CUDA: each returns a cudaError_t as int ----
int forward(const ForwardParams&, void* stream);
std::size_t backward_workspace_bytes(const Inputs&);
int backward(const BackwardParams&, void* workspace, void* stream);

}  // namespace mamba2::gated_rmsnorm
