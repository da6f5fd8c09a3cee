// A search over few candidates, for plans.
#pragma once
#include <cstdint>

namespace mamba2 {

// Of `first` and from .. to - 1 what costs least; of equals, what comes first. Each is asked once.
template <class Cost>
int64_t cheapest(int64_t first, int64_t from, int64_t to, Cost cost) {
  int64_t best = first;
  auto least = cost(first);
  for (int64_t i = from; i < to; ++i)
    if (const auto of_i = cost(i); of_i < least) best = i, least = of_i;
  return best;
}

}  // namespace mamba2
