// Division by a number that the host knows before the launch: a multiplication and a shift.
#pragma once
#include <cstdint>

#include "macros.h"

namespace mamba2 {

// n / d and n % d for 0 <= n < 2^31. With s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1,
// the quotient is (floor(n m / 2^32) + n) >> s.
struct Divisor {
  int value = 1;
  uint32_t multiplier = 1;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int d) : value(d) {
    while ((uint64_t(1) << shift) < uint64_t(d)) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - d) << 32) / d + 1);
  }
  MAMBA2_HD int quotient(int n) const {
    const uint32_t high = uint32_t(uint64_t(uint32_t(n)) * multiplier >> 32);
    return int((high + uint32_t(n)) >> shift);
  }
};
MAMBA2_HD int operator/(int n, const Divisor& d) { return d.quotient(n); }
MAMBA2_HD int operator%(int n, const Divisor& d) { return n - d.quotient(n) * d.value; }

}  // namespace mamba2
