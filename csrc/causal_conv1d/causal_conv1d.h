// causal_conv1d: the depthwise convolution before the scan, over channel-last sequences.
//   y_t = act(bias + sum_k weight_k x_{t-w+1+k}),  k = 0 .. w-1, act = silu or nothing
// Before the first token of a sequence lie its initial states, the oldest first, or zeros.
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstdint>

#include "../core/dtype.h"
#include "../core/rows.h"

namespace mamba2::causal_conv1d {

constexpr int kMinWidth = 2, kMaxWidth = 4;

struct Shape {
  int64_t b = 0, l = 0;
  int64_t nseq = 0;     // b, or the number of packed sequences
  int d = 0, w = 0;     // channels, width
  bool packed = false;  // cu_seqlens was given (then b == 1)
};

struct Inputs {
  Shape shape;
  DType dtype = DType::f32;              // x, y, states
  Rows x;                                // (b, l, d)
  AnyFloat weight;                       // (d, w)             contiguous
  AnyFloat bias;                         // (d)                contiguous, optional
  const void* initial_states = nullptr;  // (nseq, w - 1, d)  contiguous, optional
  const void* cu_seqlens = nullptr;      // (nseq + 1) int32 or int64, optional
  bool cu_seqlens_64 = false;
  bool silu = false;
};

struct ForwardParams {
  Inputs in;
  RowsOut y;                     // (b, l, d)
  void* final_states = nullptr;  // (nseq, w - 1, d) the last inputs of each sequence, optional
};

struct BackwardParams {
  Inputs in;
  Rows dy;                               // (b, l, d)
  const void* d_final_states = nullptr;  // (nseq, w - 1, d)  contiguous, optional
  RowsOut dx;                            // (b, l, d)
  void* dweight = nullptr;               // (d, w) fp32 (fp64 when dtype is)
  void* dbias = nullptr;                 // (d)    fp32/fp64, when bias is given
  void* d_initial_states = nullptr;      // (nseq, w - 1, d) dtype, when initial_states is given
};

// One more token, or T of them, from the last w - 1 inputs, which are updated in place.
struct StepParams {
  int64_t b = 0, tokens = 0, slots = 0, slot_stride = 0;
  int d = 0, w = 0;
  DType dtype = DType::f32;
  void* state = nullptr;               // (slots, w - 1, d), (w - 1, d) contiguous
  const int* state_indices = nullptr;  // (b) optional; negative: padding
  Rows x;                              // (b, T, d)
  AnyFloat weight, bias;               // (d, w), (d) optional
  bool silu = false;
  void* y = nullptr;  // (b, T, d) contiguous
};

// ---- CUDA: each returns a cudaError_t as int ----
std::size_t forward_workspace_bytes(const Shape&);
std::size_t backward_workspace_bytes(const Shape&, DType);
int forward(const ForwardParams&, void* workspace, void* stream);
int backward(const BackwardParams&, void* workspace, void* stream);
int step(const StepParams&, void* stream);

}  // namespace mamba2::causal_conv1d
