// Views of (b, l, d) arrays, as the layers around the scan see them.
#pragma once
#include <cstdint>

namespace mamba2 {

// (b, l, d): element strides of the first two dims, the last has stride 1.
struct Rows {
  const void* ptr = nullptr;
  int64_t b = 0, l = 0;
};
struct RowsOut {
  void* ptr = nullptr;
  int64_t b = 0, l = 0;
};

}  // namespace mamba2
