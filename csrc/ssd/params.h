// Arguments of the forward and the backward as the tiers see them: raw pointers and sizes.
// Every pointer carries its shape. Names are the paper's.
#pragma once
#include "shape.h"

namespace mamba2::ssd {

// What both directions read.
struct Inputs {
  Shape shape;
  DType dtype = DType::f32;  // x, B, C, z, y
  Strided x;                 // (b, l, h, p)
  Strided dt;                // (b, l, h)       dt_dtype, any strides
  DType dt_dtype = DType::f32;
  AnyFloat A;                  // (h)             contiguous
  Strided B, C;                // (b, l, g, n)
  AnyFloat D;                  // (h) or (h, p)   contiguous, optional
  bool D_per_channel = false;  // D is (h, p)
  Strided z;                   // (b, l, h, p)    optional gate
  AnyFloat dt_bias;            // (h)             contiguous, optional
  bool dt_softplus = false;
  double dt_min = 0, dt_max = 0;
  AnyFloat initial_states;           // (nseq, h, p, n) contiguous, optional
  const void* cu_seqlens = nullptr;  // (nseq + 1) int32 or int64, optional
  bool cu_seqlens_64 = false;
  const int* seq_idx = nullptr;  // (b, l) contiguous, optional
};

struct ForwardParams {
  Inputs in;
  StridedOut y;                  // (b, l, h, p)    dtype
  void* final_states = nullptr;  // (nseq, h, p, n) fp32 (fp64 when dtype is), optional
  void* chunk_states = nullptr;  // what the plan keeps for the backward, optional
  void* log_decay = nullptr;     // (nseq, h) fp32/fp64: sum_t delta_t A (natural log), optional
};

struct BackwardParams {
  Inputs in;
  Strided dy;                            // (b, l, h, p)    dtype
  const void* d_final_states = nullptr;  // (nseq, h, p, n) fp32 (fp64 when dtype is), optional
  const void* chunk_states = nullptr;    // kept by the forward, optional
  const void* d_log_decay = nullptr;  // (nseq, h) fp32/fp64: gradient of sum_t delta_t A, optional
  StridedOut dx;                      // (b, l, h, p)    dtype
  StridedOut d_dt;                    // (b, l, h)       dt_dtype, any strides
  void* dA = nullptr;                 // (h)             fp32 (fp64 when dtype is)
  StridedOut dB, dC;                  // (b, l, g, n)    dtype
  void* dD = nullptr;                 // (h) or (h, p)   fp32/fp64, when D is given
  StridedOut dz;                      // (b, l, h, p)    dtype, when z is given
  void* d_dt_bias = nullptr;          // (h)             fp32/fp64, when dt_bias is given
  void* d_initial_states = nullptr;   // (nseq, h, p, n) fp32/fp64, when initial_states is given
};

}  // namespace mamba2::ssd
