// cross_entropy: the loss of a language model, a row of logits v with target t at a time.
//   loss = log(sum_k exp(v_k)) - v_t          0 where t is -100
//   v_k  <- scale (exp(v_k) / sum - [k = t])  the gradient, in the logits' place; 0 where t is -100
// Arguments as kernels and CPU loops see them; every pointer carries its shape.
#pragma once
#include <cstdint>

#include "../core/dtype.h"

namespace mamba2::cross_entropy {

constexpr int64_t kIgnored = -100;  // a target that does not count

struct Params {
  int64_t rows = 0;
  int vocab = 0;
  DType dtype = DType::f32;
  void* logits = nullptr;  // (rows, vocab), rows `stride` elements apart
  int64_t stride = 0;
  const int64_t* targets = nullptr;  // (rows)
  const void* scale = nullptr;       // one number as `losses`; absent: logits stay as they are
  void* losses = nullptr;            // (rows) fp32 (fp64 when dtype is)
};

struct ScaleParams {
  int64_t numel = 0;
  DType dtype = DType::f32;
  void* gradient = nullptr;      // (numel)
  const void* factor = nullptr;  // one number: fp32 (fp64 when dtype is)
};

// ---- CUDA: each returns a cudaError_t as int ----
int run(const Params&, void* stream);
// gradient *= factor; where factor is 1, as in nearly every training step, nothing is read.
int scale(const ScaleParams&, void* stream);

}  // namespace mamba2::cross_entropy
