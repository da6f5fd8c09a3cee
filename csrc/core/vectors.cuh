// A thread's consecutive elements: read and written by accesses of up to 16 bytes, computed with in
// the accumulator's type. Addresses are multiples of the access.
#pragma once
#include <vector_types.h>

#include <type_traits>

#include "convert.cuh"

namespace mamba2 {

constexpr int kVectorBytes = 16;  // of the widest access

template <int kBytes>
using word_t = std::conditional_t<
    kBytes >= 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// Elements as they lie in memory: loads of several can be in flight before one is looked at.
template <class T, int kCount>
struct Packed {
  using Word = word_t<static_cast<int>(sizeof(T)) * kCount>;
  static constexpr int kWords = static_cast<int>(sizeof(T)) * kCount / int{sizeof(Word)};
  Word words[kWords];

  MAMBA2_DEVICE void load(const T* from) {
    MAMBA2_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  }
  MAMBA2_DEVICE void zero() {
    MAMBA2_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = Word{};
  }
  template <class U>
  MAMBA2_DEVICE void unpack(U (&to)[kCount]) const {
    if constexpr (sizeof(T) == 2 && kCount % 2 == 0 && std::is_same_v<U, float>) {
      uint32_t pairs[kCount / 2];
      __builtin_memcpy(pairs, words, sizeof pairs);
      MAMBA2_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        const float2 v = unpack2<T>(pairs[i]);
        to[2 * i] = v.x;
        to[2 * i + 1] = v.y;
      }
    } else {
      T elements[kCount];
      __builtin_memcpy(static_cast<void*>(elements), words, sizeof elements);
      MAMBA2_UNROLL
      for (int i = 0; i < kCount; ++i) to[i] = convert<U>(elements[i]);
    }
  }
};

template <class T, int kCount, class U>
MAMBA2_DEVICE void load_vector(const T* from, U (&to)[kCount]) {
  Packed<T, kCount> packed;
  packed.load(from);
  packed.unpack(to);
}

template <class T, int kCount, class U>
MAMBA2_DEVICE void store_vector(T* to, const U (&from)[kCount]) {
  using Word = typename Packed<T, kCount>::Word;
  constexpr int kWords = Packed<T, kCount>::kWords;
  Word words[kWords];
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0 && std::is_same_v<U, float>) {
    uint32_t pairs[kCount / 2];
    MAMBA2_UNROLL
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
    __builtin_memcpy(words, pairs, sizeof pairs);
  } else {
    T elements[kCount];
    MAMBA2_UNROLL
    for (int i = 0; i < kCount; ++i) elements[i] = convert<T>(from[i]);
    __builtin_memcpy(words, static_cast<const void*>(elements), sizeof elements);
  }
  MAMBA2_UNROLL
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
}

}  // namespace mamba2
