// Sizes of one SSD problem and where its tensors lie. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "../core/dtype.h"

namespace mamba2::ssd {

// b batch, l length, h heads, p head dim, g groups (of B and C), n state dim.
// A row is a batch entry; a sequence is what a state runs through: a row, or with cu_seqlens one
// packed sequence of the single row.
struct Shape {
  int64_t b = 0, l = 0;
  int h = 0, p = 0, g = 1, n = 0;
  int64_t nseq = 0;     // b, or the number of packed sequences
  bool packed = false;  // cu_seqlens was given (then b == 1)

  constexpr int heads_per_group() const { return h / g; }
  // Upper bound on the number of chunks of q tokens, when chunks start at sequence starts.
  constexpr int64_t chunks(int q) const { return packed ? l / q + nseq : b * ((l + q - 1) / q); }
};

// A (b, l, h, p)-like tensor: element strides of the first three dims, the last has stride 1.
// For B and C "h" is the group; for dt (b, l, h) the last dim is h itself: stride h, no further
// dim.
struct Strided {
  const void* ptr = nullptr;
  int64_t b = 0, l = 0, h = 0;
  explicit constexpr operator bool() const { return ptr != nullptr; }
};
struct StridedOut {
  void* ptr = nullptr;
  int64_t b = 0, l = 0, h = 0;
  explicit constexpr operator bool() const { return ptr != nullptr; }
};

}  // namespace mamba2::ssd
