// The gradient of a parameter from the partial sums of blocks, in a fixed order.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace mamba2 {

struct SumPartsParams {
  const void* parts = nullptr;  // (count, numel) fp32, or fp64
  int64_t count = 0, numel = 0;
  int64_t split = 0;  // sums [0, split) go to `first`, the others to `second`
  void *first = nullptr, *second = nullptr;  // null: not wanted
  DType dtype = DType::f32;                  // of all of them
};
// Returns a cudaError_t as int.
int sum_parts(const SumPartsParams&, void* stream);

}  // namespace mamba2
